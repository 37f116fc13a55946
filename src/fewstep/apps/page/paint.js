// Paint a mask on a picture: props.value has the picture, its size, and a letter for each pixel, 1 where it is to be filled in.
const read = () => props.value || {};
const canvas = () => element.querySelector("canvas");
let mask = null, ink = "1"; // while a finger or a button is down

const dot = (k, v) => {
  const c = canvas().getContext("2d");
  c.fillStyle = "rgb(213, 94, 0)";
  c.fillRect(k % v.width, Math.floor(k / v.width), 1, 1);
};

const show = () => {
  const v = read(), picture = new Image();
  if (!canvas() || !v.width) return;
  canvas().width = v.width;
  canvas().height = v.height;
  picture.onload = () => {
    canvas().getContext("2d").drawImage(picture, 0, 0, v.width, v.height);
    [...v.mask].forEach((letter, k) => letter === "1" && dot(k, v));
  };
  picture.src = v.picture;
};

const place = (event, v) => {
  const box = canvas().getBoundingClientRect();
  return [Math.floor((event.clientX - box.left) / box.width * v.width), Math.floor((event.clientY - box.top) / box.height * v.height)];
};

const paint = (event) => {
  const v = read(), [x, y] = place(event, v), reach = Math.floor(v.width / 32);
  for (let i = Math.max(y - reach, 0); i <= Math.min(y + reach, v.height - 1); i++)
    for (let j = Math.max(x - reach, 0); j <= Math.min(x + reach, v.width - 1); j++) mask[i * v.width + j] = ink;
  mask.forEach((letter, k) => letter === "1" && dot(k, v));
};

element.addEventListener("pointerdown", (event) => {
  const v = read();
  if (event.target !== canvas() || !v.width) return;
  event.preventDefault();
  const [x, y] = place(event, v);
  mask = v.mask.split("");
  ink = mask[y * v.width + x] === "1" ? "0" : "1";
  paint(event);
});
element.addEventListener("pointermove", (event) => mask && event.target === canvas() && paint(event));
window.addEventListener("pointerup", () => {
  if (!mask) return;
  props.value = { ...read(), mask: mask.join("") };
  mask = null;
  setTimeout(show, 0);
});
watch("value", show);
show();
