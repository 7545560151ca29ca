// Beside a page of the workbench: names for screen readers, keys, the room there is, the pointer, files in and out.
const STEP = 8; // pixels of the figure that an arrow key moves the cross by; with Shift one
const ZOOM = 1.5, LARGEST = ZOOM ** 4; // times its own size

function nameParts(page, alt) {
  for (const control of page.querySelectorAll(".widget-inline-hbox")) {
    const words = control.querySelector(".widget-label")?.textContent;
    if (!words) continue;
    for (const part of control.querySelectorAll(".noUi-handle, .widget-readout")) part.setAttribute("aria-label", words);
    for (const bar of control.querySelectorAll(".progress")) {
      bar.setAttribute("role", "progressbar");
      bar.setAttribute("aria-label", words);
    }
  }
  for (const image of page.querySelectorAll("img.widget-image")) image.alt = alt;
}

// JupyterLab takes plain keys for its own commands ("x" cuts a cell) unless their target says not to.
function keepKeys(event, page) {
  if (!page.contains(event.target)) return;
  event.target.toggleAttribute("data-lm-suppress-shortcuts", !(event.ctrlKey || event.metaKey || event.altKey));
}

function takeFiles(page, model) {
  const files = (event) => event.dataTransfer?.types.includes("Files");
  page.addEventListener("dragover", (event) => files(event) && event.preventDefault());
  page.addEventListener("drop", async (event) => {
    if (!files(event)) return;
    event.preventDefault(), event.stopPropagation();
    const file = event.dataTransfer.files[0];
    if (file) model.send({ kind: "file", name: file.name }, undefined, [await file.arrayBuffer()]);
  });
}

function save({ name, type }, buffers) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(buffers, { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// The pixel of the figure under the pointer, or under the cross that arrow keys move, and what the page says of it.
class Pointer {
  constructor(figure, model, page) {
    Object.assign(this, { figure, model, asked: false, next: null });
    this.tip = page.appendChild(Object.assign(document.createElement("div"), { className: "dpt-nb-tip" }));
    this.cross = page.appendChild(Object.assign(document.createElement("div"), { className: "dpt-nb-cross" }));
    this.tip.setAttribute("aria-live", "polite");
    this.hide();
    figure.tabIndex = 0;
    figure.addEventListener("pointermove", (event) => this.toClient(event.clientX, event.clientY));
    figure.addEventListener("pointerleave", () => this.hide());
    figure.addEventListener("blur", () => this.hide());
    figure.addEventListener("keydown", (event) => this.key(event));
    model.on("msg:custom", (message) => message.kind === "told" && this.told(message.text));
  }
  scale() {
    return this.figure.naturalWidth / this.figure.getBoundingClientRect().width;
  }
  toClient(x, y) {
    const box = this.figure.getBoundingClientRect();
    this.at = { x: (x - box.left) * this.scale(), y: (y - box.top) * this.scale() };
    this.cross.style.display = "none";
    this.ask();
  }
  key(event) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const zoom = { "+": 1, "=": 1, "-": -1 }[event.key];
    if (event.key === "Escape") return this.hide();
    if (zoom && !event.ctrlKey && !event.metaKey) return event.preventDefault(), this.zoom(zoom);
    if (!move && event.key !== "Enter") return;
    event.preventDefault();
    this.at ??= { x: this.figure.naturalWidth / 12, y: this.figure.naturalHeight / 4 };
    if (!move) return this.click();
    const step = event.shiftKey ? 1 : STEP;
    this.at.x = Math.min(this.figure.naturalWidth - 1, Math.max(0, this.at.x + step * move[0]));
    this.at.y = Math.min(this.figure.naturalHeight - 1, Math.max(0, this.at.y + step * move[1]));
    this.cross.style.display = "block";
    if (this.zoomed > 1) this.cross.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.ask();
  }
  zoom(step) { // larger than there is room for, the figure is scrolled inside its half of the page
    this.zoomed = Math.max(1, Math.min(LARGEST, (this.zoomed ?? 1) * ZOOM ** step));
    const large = this.zoomed > 1.01, wide = this.figure.closest(".dpt-nb-wide");
    const style = large ? { width: `${this.figure.naturalWidth * this.zoomed}px`, maxWidth: "none" } : { width: "", maxWidth: "" };
    Object.assign(this.figure.style, style, { imageRendering: large ? "pixelated" : "" });
    Object.assign(wide.style, large ? { overflow: "auto", maxHeight: "90vh" } : { overflow: "", maxHeight: "" });
    this.hide();
  }
  client() {
    const box = this.figure.getBoundingClientRect();
    return { clientX: box.left + this.at.x / this.scale(), clientY: box.top + this.at.y / this.scale() };
  }
  click() {
    this.figure.dispatchEvent(new MouseEvent("click", { bubbles: true, ...this.client() }));
  }
  ask() { // one question at a time: the kernel may be slower than the hand
    if (this.asked && Date.now() - this.asked < 3000) return (this.next = this.at);
    this.asked = Date.now();
    this.model.send({ kind: "point", x: this.at.x, y: this.at.y });
  }
  told(text) {
    this.asked = false;
    if (this.at) this.show(text);
    if (this.at && this.next) this.ask();
    this.next = null;
  }
  show(text) {
    const { clientX, clientY } = this.client();
    const page = this.tip.parentElement.getBoundingClientRect();
    this.tip.textContent = text;
    this.tip.style.display = text ? "block" : "none";
    for (const mark of [this.tip, this.cross])
      Object.assign(mark.style, { left: `${clientX - page.left}px`, top: `${clientY - page.top}px` });
  }
  hide() {
    this.at = this.next = null;
    this.tip.style.display = this.cross.style.display = "none";
  }
}

function watch(page, model) {
  let late;
  const named = () => nameParts(page, model.get("alt"));
  const keys = (event) => keepKeys(event, page);
  const added = new MutationObserver(named);
  const sized = new ResizeObserver(([{ contentRect }]) => {
    clearTimeout(late);
    const width = Math.round(contentRect.width);
    if (width) late = setTimeout(() => (model.set("width", width), model.save_changes()), 150);
  });
  const figure = page.querySelector("img.dpt-nb-figure"), wide = page.querySelector(".dpt-nb-wide");
  model.on("change:alt", named);
  let pointer = null;
  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "save") save(message, buffers);
    if (message.kind === "zoom") pointer?.zoom(message.step);
  });
  window.addEventListener("keydown", keys, true);
  added.observe(page, { childList: true, subtree: true });
  if (wide) sized.observe(wide);
  if (figure) pointer = new Pointer(figure, model, page);
  named(), takeFiles(page, model);
  return () => (window.removeEventListener("keydown", keys, true), added.disconnect(), sized.disconnect());
}

export default {
  render({ model, el }) {
    let end = null, gone = false;
    const begin = () => {
      if (gone) return;
      const page = el.closest(".dpt-nb-page");
      page ? (end = watch(page, model)) : requestAnimationFrame(begin); // not yet on the page
    };
    begin();
    return () => ((gone = true), end?.());
  },
};
