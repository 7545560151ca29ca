// What a token sees: from attention that was computed before (tests/book_attention.py), drawn where the reader is.
(() => {
  "use strict";
  const stored = window.tokenExplorer;
  const part = name => document.getElementById(`token-explorer-${name}`);
  const [rows, columns] = stored.grid, tokens = stored.prefix + rows * columns, SCALE = 2, OPACITY = 0.75;
  const chosen = { scene: 0, block: 0, head: 0, row: rows >> 1, column: columns >> 2, classToken: false };
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const colors = bytes(stored.colors);
  const scenes = [];

  // A scene as it is needed: its pixels, and a byte for each weight.
  async function unpack(scene) {
    const packed = new Blob([bytes(scene.attention)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const attention = new Uint8Array(await new Response(packed).arrayBuffer());
    const image = new Image();
    image.src = scene.pixels;
    await image.decode();
    return { image, attention };
  }

  async function prepare(scene) {
    scenes[scene] ??= await unpack(stored.scenes[scene]);
  }

  // What one token gives to each, in one head: a byte is the root of a weight, and a row sums to one.
  function headRow(scene, block, head, token) {
    const start = ((block * stored.heads + head) * tokens + token) * tokens;
    const squares = Array.from(scenes[scene].attention.subarray(start, start + tokens), byte => byte * byte);
    const sum = squares.reduce((all, one) => all + one, 0);
    return squares.map(square => square / sum);
  }

  // The same, and the mean of the heads for the number after the last of them.
  function row(scene, block, head, token) {
    if (head < stored.heads) return headRow(scene, block, head, token);
    const each = Array.from({ length: stored.heads }, (_, one) => headRow(scene, block, one, token));
    return each[0].map((_, place) => each.reduce((sum, one) => sum + one[place], 0) / stored.heads);
  }

  const token = () => (chosen.classToken ? 0 : stored.prefix + chosen.row * columns + chosen.column);
  const effective = weights => Math.exp(-weights.reduce((sum, one) => sum + (one > 0 ? one * Math.log(one) : 0), 0));
  const percent = (value, digits) => `${(100 * value).toFixed(digits)} %`;

  function sentence(weights) {
    const patches = weights.slice(stored.prefix), most = Math.max(...patches), place = patches.indexOf(most);
    const who = chosen.classToken ? "The class token" : `The patch in row ${chosen.row}, column ${chosen.column}`;
    const head = chosen.head < stored.heads ? `head ${chosen.head}` : "the mean of the heads";
    const among = percent(patches.reduce((sum, one) => sum + one, 0), 0);
    return `${who} spreads its attention over about ${effective(weights).toFixed(0)} of ${tokens} tokens in block ` +
      `${chosen.block}, ${head}. ${among} of it goes to patches, the most, ${percent(most, 1)}, to row ` +
      `${Math.floor(place / columns)}, column ${place % columns}.`;
  }

  function frame(context, side) {
    if (chosen.classToken) return;
    for (const [color, width] of [["#000", 8], ["#33ff99", 4]]) {  // seen on dark and on bright patches
      context.strokeStyle = color;
      context.lineWidth = width;
      context.strokeRect(chosen.column * side + 2, chosen.row * side + 2, side - 4, side - 4);
    }
  }

  function canvasOf(name, image) {
    const canvas = part(name), context = canvas.getContext("2d", { willReadFrequently: true });
    [canvas.width, canvas.height] = [image.naturalWidth * SCALE, image.naturalHeight * SCALE];
    context.imageSmoothingEnabled = false;  // each pixel as it is
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return [canvas, context];
  }

  // Heat over the gray image, the largest weight brightest.
  function drawMap(image, weights) {
    const [canvas, context] = canvasOf("map", image), side = canvas.width / columns;
    const patches = weights.slice(stored.prefix), most = Math.max(...patches, 1e-12);
    const drawn = context.getImageData(0, 0, canvas.width, canvas.height), data = drawn.data;
    for (let at = 0; at < data.length; at += 4) {
      const x = (at / 4) % canvas.width, y = Math.floor(at / 4 / canvas.width);
      const weight = patches[Math.floor(y / side) * columns + Math.floor(x / side)] / most;
      const color = 3 * Math.min(255, Math.floor(256 * weight)), gray = (data[at] + data[at + 1] + data[at + 2]) / 3;
      for (let i = 0; i < 3; i++) data[at + i] = gray + (colors[color + i] - gray) * OPACITY;
    }
    context.putImageData(drawn, 0, 0);
    frame(context, side);
  }

  async function draw() {
    const asked = chosen.scene;
    if (!scenes[asked]) await prepare(asked);
    if (asked !== chosen.scene) return;  // another was chosen meanwhile
    const { image } = scenes[asked], weights = row(asked, chosen.block, chosen.head, token());
    const [canvas, context] = canvasOf("image", image);
    frame(context, canvas.width / columns);
    drawMap(image, weights);
    part("block-name").value = chosen.block;
    part("head-name").value = chosen.head < stored.heads ? chosen.head : "mean";
    part("head").setAttribute("aria-valuetext", chosen.head < stored.heads ? `${chosen.head}` : "mean of the heads");
    part("class").setAttribute("aria-pressed", chosen.classToken);
    part("said").textContent = sentence(weights);
  }

  function choose(change) {
    Object.assign(chosen, change);
    draw().catch(error => { part("said").textContent = `This browser could not draw it: ${error.message}`; });
  }

  const limited = (value, count) => Math.max(0, Math.min(count - 1, value));
  const toPatch = (row, column) => choose({ row: limited(row, rows), column: limited(column, columns), classToken: false });

  function clicked(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    toPatch(Math.floor(y * rows), Math.floor(x * columns));
  }

  function pressed(event) {
    const to = {
      ArrowLeft: [chosen.row, chosen.column - 1], ArrowRight: [chosen.row, chosen.column + 1],
      ArrowUp: [chosen.row - 1, chosen.column], ArrowDown: [chosen.row + 1, chosen.column],
      Home: [chosen.row, 0], End: [chosen.row, columns - 1],
    }[event.key];
    if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();  // the page does not scroll
    toPatch(...to);
  }

  part("scene").append(...stored.scenes.map((scene, number) => new Option(scene.name, number)));
  part("block").max = stored.blocks - 1;
  part("head").max = stored.heads;  // the last is the mean
  part("scene").addEventListener("change", event => choose({ scene: Number(event.target.value) }));
  part("block").addEventListener("input", event => choose({ block: Number(event.target.value) }));
  part("head").addEventListener("input", event => choose({ head: Number(event.target.value) }));
  part("class").addEventListener("click", () => choose({ classToken: !chosen.classToken }));
  part("image").addEventListener("click", clicked);
  part("map").addEventListener("click", clicked);
  part("image").addEventListener("keydown", pressed);
  // What a browser keeps of an earlier visit.
  const kept = { scene: Number(part("scene").value), block: Number(part("block").value), head: Number(part("head").value) };
  stored.row = async (scene, ...which) => { await prepare(scene); return row(scene, ...which); };  // for whoever asks
  choose(kept);
})();
