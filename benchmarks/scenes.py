"""How many rooms and streets of 96 × 128 does one core make a second?

    python benchmarks/scenes.py

Each line is the median over several rounds; a round makes every scene from its seed and draws it.
Two ceilings are measured in the same rounds, so that a busy machine slows all of them alike:

- a bare room: the rays, one slab test and Lambert's cosine, nothing in the room, no texture, no shadow;
- memory: writing and reading a picture's results (image, depth, label) once, element by element.
"""

import statistics
import time

import torch

from dpt_nb.scenes.camera import pixel_rays
from dpt_nb.scenes.raycast import hit_shell, nearest_simple, render
from dpt_nb.scenes.scenes import random_scene

SIZE = (96, 128)
SEEDS = range(40)
ROUNDS = 7


def bare_room(scene):
    "The least that can be called a picture of a room: every pixel's wall, shaded by the cosine of its slant."
    camera = scene.camera
    direction = camera.rotation().float() @ pixel_rays(camera.intrinsics(), camera.height, camera.width)
    t, face = hit_shell(torch.tensor(camera.position)[:, None], direction, scene.shell)
    along = direction.gather(0, (face // 2)[None])[0].abs()
    shade = along / (direction * direction).sum(0).sqrt()
    return dict(
        image=(scene.materials[:3, face] * shade).view(3, *SIZE),
        depth=t.view(1, *SIZE),
        label=scene.labels[face].view(SIZE),
    )


def touch(result):
    "One elementwise pass over what a picture's results hold."
    return [result[name] + 1 for name in ("image", "depth", "label")]


def seconds(make):
    "Seconds a scene for one round of all seeds."
    start = time.perf_counter()
    for seed in SEEDS:
        make(seed)
    return (time.perf_counter() - start) / len(SEEDS)


def main():
    torch.set_num_threads(1)
    rooms = [random_scene("rooms", seed, SIZE) for seed in SEEDS]
    drawn = render(rooms[0])
    tasks = {
        "rooms": lambda seed: render(random_scene("rooms", seed, SIZE)),
        "rooms, simple caster": lambda seed: render(random_scene("rooms", seed, SIZE), nearest_simple),
        "streets": lambda seed: render(random_scene("streets", seed, SIZE)),
        "streets, simple caster": lambda seed: render(random_scene("streets", seed, SIZE), nearest_simple),
        "rooms, the scene alone": lambda seed: random_scene("rooms", seed, SIZE),
        "ceiling: bare room": lambda seed: bare_room(rooms[seed]),
        "ceiling: memory": lambda seed: touch(drawn),
    }
    for make in tasks.values():
        make(0)  # warm up
    rounds = [{name: seconds(make) for name, make in tasks.items()} for _ in range(ROUNDS)]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread, {SIZE[0]} x {SIZE[1]}, {len(SEEDS)} seeds, "
        f"median of {ROUNDS} rounds"
    )
    print(f"{'':26}{'a second':>12}{'ms each':>10}{'slowest':>10}{'rooms take':>12}")
    for name in tasks:
        times = [r[name] for r in rounds]
        ratio = statistics.median(r["rooms"] / r[name] for r in rounds)
        print(
            f"{name:26}{1 / statistics.median(times):12.1f}{1e3 * statistics.median(times):10.3f}"
            f"{1e3 * max(times):10.3f}{ratio:11.2f}x"
        )
    rate = 1 / statistics.median(r["rooms"] for r in rounds)
    print(f"rooms: {rate:.0f} a second on one core; the goal is 100: {'met' if rate >= 100 else 'MISSED'}")


if __name__ == "__main__":
    main()
