// Points in space that one turns: a z-buffer on a plain canvas, which needs neither the network nor a graphics card.
const WIDTH = 640, HEIGHT = 480, TURN = Math.PI / 36;
const HINT = "Drag or arrow keys turn, wheel or + and − come nearer, 0 goes back.";

class Cloud {
  constructor(canvas, told) {
    Object.assign(this, { canvas, told, context: canvas.getContext("2d") });
    this.picture = this.context.createImageData(WIDTH, HEIGHT);
    this.colors32 = new Uint32Array(this.picture.data.buffer);
    this.depth = new Float32Array(WIDTH * HEIGHT);
    this.back();
  }
  back() {
    Object.assign(this, { yaw: 0, pitch: 0, near: 1 });
  }
  fill(points, colors, pivot, focal) {
    Object.assign(this, { points, colors, pivot, focal });
    this.draw();
  }
  turn(yaw, pitch) {
    this.yaw += yaw;
    this.pitch = Math.max(-Math.PI / 2, Math.min(Math.PI / 2, this.pitch + pitch));
    this.draw();
  }
  come(times) {
    this.near = Math.max(0.2, Math.min(10, this.near * times));
    this.draw();
  }
  draw() { // about a point in the middle of the scene, which stays where it is
    const { points, colors, depth, colors32 } = this, count = points.length / 3;
    const [cy, sy, cp, sp] = [Math.cos(this.yaw), Math.sin(this.yaw), Math.cos(this.pitch), Math.sin(this.pitch)];
    const focal = this.focal * WIDTH, away = this.pivot / this.near;
    depth.fill(Infinity), colors32.fill(0); // where no point is, the ground is seen
    for (let i = 0; i < count; i++) {
      const x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2] - this.pivot;
      const across = cy * x + sy * z, deep = -sy * x + cy * z;
      const down = cp * y + sp * deep, far = -sp * y + cp * deep + away;
      if (far < 0.05) continue;
      const column = Math.round(WIDTH / 2 + (focal * across) / far), row = Math.round(HEIGHT / 2 + (focal * down) / far);
      const dot = Math.max(1, Math.min(8, Math.ceil((WIDTH * this.grain * points[3 * i + 2]) / far)));
      const color = 0xff000000 | (colors[3 * i + 2] << 16) | (colors[3 * i + 1] << 8) | colors[3 * i];
      for (let r = Math.max(0, row); r < Math.min(HEIGHT, row + dot); r++)
        for (let c = Math.max(0, column); c < Math.min(WIDTH, column + dot); c++)
          if (far < depth[r * WIDTH + c]) (depth[r * WIDTH + c] = far), (colors32[r * WIDTH + c] = color);
    }
    this.context.putImageData(this.picture, 0, 0);
    const degrees = (angle) => Math.round((angle * 180) / Math.PI);
    this.told(`${count} points, turned ${degrees(this.yaw)}° to the left and ${degrees(this.pitch)}° up. ${HINT}`);
  }
}

const KEYS = {
  ArrowLeft: (cloud) => cloud.turn(TURN, 0), ArrowRight: (cloud) => cloud.turn(-TURN, 0),
  ArrowUp: (cloud) => cloud.turn(0, TURN), ArrowDown: (cloud) => cloud.turn(0, -TURN),
  "+": (cloud) => cloud.come(1.1), "=": (cloud) => cloud.come(1.1), "-": (cloud) => cloud.come(1 / 1.1),
  0: (cloud) => (cloud.back(), cloud.draw()),
};

function listen(canvas, cloud) {
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || !(event.key in KEYS)) return;
    event.preventDefault(), KEYS[event.key](cloud);
  });
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) cloud.turn(event.movementX * 0.008, event.movementY * 0.008);
  });
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return; // the page scrolls until the cloud was chosen
    event.preventDefault(), cloud.come(event.deltaY < 0 ? 1.1 : 1 / 1.1);
  }, { passive: false });
}

export default {
  render({ model, el }) {
    el.innerHTML = `<canvas width="${WIDTH}" height="${HEIGHT}" tabindex="0" role="application"
      style="width: 100%; max-width: ${WIDTH}px; touch-action: none; cursor: grab;
      background: var(--jp-layout-color2, #eee)"></canvas>
      <div role="status" style="line-height: 1.4"></div>`;
    const canvas = el.querySelector("canvas"), words = el.querySelector("div");
    const cloud = new Cloud(canvas, (text) => (words.textContent = text));
    const view = (name, kind) => {
      const bytes = model.get(name);
      const own = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength); // floats begin at fours
      return new kind(own);
    };
    const fill = () => {
      canvas.setAttribute("aria-label", `A cloud of points that can be turned. ${HINT}`);
      cloud.grain = model.get("grain");
      cloud.fill(view("points", Float32Array), view("colors", Uint8Array), model.get("pivot"), model.get("focal"));
    };
    listen(canvas, cloud);
    model.on("change:drawn", fill);
    fill();
  },
};
