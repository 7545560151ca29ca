// Two images of one size over each other: left of the slider the first, right of it the second.
const CSS = `
.dpt-nb-over {position: relative; max-width: 640px; touch-action: pan-y; cursor: ew-resize; line-height: 0}
.dpt-nb-over img {width: 100%; image-rendering: pixelated; user-select: none; pointer-events: none}
.dpt-nb-over img + img {position: absolute; inset: 0; height: 100%}
.dpt-nb-over i {position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; outline: 1px solid #000}
.dpt-nb-ends {display: flex; justify-content: space-between; max-width: 640px; gap: 1em}
.dpt-nb-slide {width: 100%; max-width: 640px; margin: 4px 0}`;

function addressOf(bytes) {
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}

export default {
  render({ model, el }) {
    el.innerHTML = `<style>${CSS}</style><div class="dpt-nb-ends"><span></span><span></span></div>
      <div class="dpt-nb-over"><img draggable="false"><img draggable="false"><i></i></div>
      <input class="dpt-nb-slide" type="range" min="0" max="100" step="1">`;
    const [second, first] = el.querySelectorAll("img"), words = el.querySelectorAll("span");
    const over = el.querySelector(".dpt-nb-over"), line = el.querySelector("i"), slide = el.querySelector("input");
    const cut = () => {
      first.style.clipPath = `inset(0 ${100 - slide.value}% 0 0)`;
      line.style.left = `${slide.value}%`;
      slide.setAttribute("aria-valuetext", `${slide.value} % ${words[0].textContent}`);
    };
    const fill = () => {
      for (const [image, name] of [[first, "first"], [second, "second"]]) {
        URL.revokeObjectURL(image.src);
        image.src = addressOf(model.get(name));
      }
      const names = model.get("names");
      [0, 1].forEach((side) => (words[side].textContent = [`◂ ${names[0]}`, `${names[1]} ▸`][side]));
      [first.alt, second.alt] = names;
      slide.setAttribute("aria-label", `between ${names[0]} and ${names[1]}`);
      cut();
    };
    const drag = (event) => {
      if (event.type === "pointerdown") over.setPointerCapture(event.pointerId);
      if (!event.buttons) return;
      const box = over.getBoundingClientRect();
      slide.value = (100 * (event.clientX - box.left)) / box.width;
      cut();
    };
    slide.value = 50;
    slide.addEventListener("input", cut);
    over.addEventListener("pointerdown", drag), over.addEventListener("pointermove", drag);
    model.on("change:drawn", fill); // the last that is set: both images and names have come
    fill();
  },
};
