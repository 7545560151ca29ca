// Small pictures in a row, each a button: Tab goes from one to the next, Enter and Space choose.
const CSS = `
.dpt-nb-examples {display: flex; flex-wrap: wrap; gap: 4px; max-width: 310px; padding: 2px 0}
.dpt-nb-examples button {padding: 0; border: 2px solid transparent; background: none; cursor: pointer; line-height: 0}
.dpt-nb-examples button:is(:hover, :focus-visible) {border-color: currentcolor; outline: none}
.dpt-nb-examples img {width: 64px; height: 48px}`;

export default {
  render({ model, el }) {
    const row = document.createElement("div"), style = document.createElement("style");
    row.className = "dpt-nb-examples";
    row.setAttribute("role", "group"), row.setAttribute("aria-label", "examples");
    style.textContent = CSS;
    const names = model.get("names"), made = [];
    model.get("pictures").forEach((bytes, place) => {
      const button = document.createElement("button"), image = document.createElement("img");
      image.src = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
      image.alt = button.title = names[place];
      button.type = "button";
      button.addEventListener("click", () => model.send({ kind: "chosen", name: names[place] }));
      button.append(image), row.append(button), made.push(image.src);
    });
    el.append(style, row);
    return () => made.forEach((address) => URL.revokeObjectURL(address));
  },
};
