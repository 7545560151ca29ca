// A picture with the camera: a press opens it, another one takes the picture. It is off at all other times.
const CSS = `
.dpt-nb-camera {width: 250px; max-width: 100%; margin: 2px; line-height: 1.3}
.dpt-nb-camera button {width: 100%; margin: 0 0 2px}
.dpt-nb-camera video {display: block; width: 100%; margin: 2px 0; background: #222}
.dpt-nb-camera [hidden] {display: none}`;
const REASONS = {
  NotAllowedError: "The browser may not use the camera: allow it beside the address, then press again.",
  NotFoundError: "No camera was found on this machine: send a file instead.",
  NotReadableError: "The camera cannot be opened, perhaps another program uses it: end that, then press again.",
};
const ELSEWHERE = "The browser gives a camera only to pages of this machine, or over https: send a file instead.";

function reason(error) {
  return REASONS[error.name] ?? `The camera cannot be opened (${error.message}): send a file instead.`;
}

async function opened() {
  if (!navigator.mediaDevices) throw Object.assign(new Error(), { told: ELSEWHERE });
  return navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, facingMode: "environment" } });
}

function drawn(video) { // JPEG
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
}

class Camera {
  constructor(model, el) {
    const make = (tag, more) => Object.assign(document.createElement(tag), more);
    const button = (more) => make("button", { type: "button", className: "jupyter-button widget-button", ...more });
    const tip = "with the camera, which is on until the picture is taken; it stays on this machine";
    this.model = model;
    this.press = button({ title: tip, onclick: () => (this.stream ? this.take() : this.open()) });
    this.cancel = button({ textContent: "cancel", onclick: () => (this.close(), this.press.focus()) });
    this.video = make("video", { muted: true, playsInline: true });
    this.video.setAttribute("aria-label", "what the camera sees");
    this.told = make("div");
    this.told.setAttribute("role", "status");
    const box = make("div", { className: "dpt-nb-camera" });
    box.addEventListener("keydown", (event) => event.key === "Escape" && this.stream && this.cancel.click());
    box.append(make("style", { textContent: CSS }), this.press, this.cancel, this.video, this.told);
    el.append(box);
    this.seen = new ResizeObserver(() => this.video.offsetParent || this.close()); // another tab of the workbench
    this.seen.observe(this.video);
    this.close();
  }
  show() {
    this.cancel.hidden = this.video.hidden = !this.stream;
    this.press.textContent = this.stream ? "take it" : "take a photograph";
  }
  async open() {
    this.told.textContent = "";
    this.press.disabled = true; // while the browser asks whether it may
    try {
      const stream = await opened();
      if (this.gone) return stream.getTracks().forEach((track) => track.stop());
      this.stream = this.video.srcObject = stream;
      this.show();
      await this.video.play();
    } catch (error) {
      this.close();
      this.told.textContent = error.told ?? reason(error);
    } finally {
      this.press.disabled = false;
      this.press.focus(); // which a disabled button loses
    }
  }
  async take() {
    if (!this.video.videoWidth) return; // no picture has come yet
    const picture = await drawn(this.video);
    this.close();
    this.model.send({ kind: "taken" }, undefined, [await picture.arrayBuffer()]);
  }
  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = this.video.srcObject = null;
    this.show();
  }
  end() {
    this.gone = true;
    this.seen.disconnect(), this.close();
  }
}

export default {
  render({ model, el }) {
    const camera = new Camera(model, el);
    return () => camera.end();
  },
};
