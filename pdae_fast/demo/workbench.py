"""What the page asks for, as functions that need no server: images are read, kept, edited, mixed, drawn and opened up.

What an image costs is paid once: its z, and its x_T and reconstruction by each recipe, are kept for as long as the
image is, and only so many images are. Every function takes ``stop``, which is called after each network evaluation and
ends the work by an exception of its own. Results are plain values, and images [C, H, W] in [-1, 1].
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .. import metrics
from ..arguments import as_int, as_number, brief
from ..data import BrokenImage, load_image
from ..data.preprocess import stored_size
from ..errors import UserError
from ..experiments import animation, few_shot
from ..experiments.analyze import shift
from ..experiments.analyze.times import noise_at, points, time_grid
from ..experiments.common import check_finite
from ..experiments.manipulate import asked
from ..models import PDAE, Autoencoder, DiffAE
from ..pipeline import INTERPOLATIONS, Pipeline
from ..samplers.recipe import RECIPES, Recipe
from ..samplers.solvers import SOLVERS

# What one request may ask for.
MOST_BYTES, MOST_PIXELS = 2**24, 5 * 10**7  # of an upload
MOST_IMAGES, MOST_FRAMES, MOST_TIMES, MOST_STEPS, MOST_SEED = 12, 17, 12, 200, 2**31 - 1
MOST_SCALE = 1.0
MOST_DRAWS = 2048  # of z, to find images with an attribute
# The published rejection accepts next to nothing from a handful of positives in hundreds of dimensions: the z that are
# most alike are taken instead, of so many, by a classifier that its penalty keeps near the direction of the means.
ALIKE_DRAWS, ALIKE_L2 = 1024, 100.0
# What is kept.
KEPT_IMAGES, KEPT_LATENTS = 64, 6
SHOWN, POOL = 32, 128  # images that the page offers; images that few-shot takes for "any others"

PREVIEW = Recipe(steps=5, spacing="quadratic", iterations=2)  # while a slider moves
# The first sliders, as far as a classifier has them: those that the bundled one moves most visibly.
FIRST = (
    "sunglasses", "mouth=smile+tongue", "beard", "long_hair", "dark_skin", "hat", "dark_background", "eyeglasses",
    "jacket", "pale_skin", "gray_hair", "blond_hair", "brown_hair", "black_hair", "bald", "moustache", "Trouser",
)  # fmt: skip
# A slider goes as far as asks for so many logits of a middling attribute: farther on images fall apart.
REACH_LOGITS = 20

LATENT_STEPS = 20  # of the latent DPM; more change little (of avatars64: deviation of z 0.33, at 100 steps 0.36)

Stop = Callable[[int], Any]
Values = dict[str, Any]


def never(count: int) -> None:
    """A ``stop`` that goes on."""


class Spent:
    """Network evaluations (in images) and seconds of one request: a ``stop`` that counts, and leaves out what others
    compute inside of it."""

    def __init__(self, stop: Stop) -> None:
        self.evaluations, self._stop, self._start = 0, stop, time.perf_counter()

    def __call__(self, count: int) -> None:
        self.evaluations += count
        before = time.perf_counter()
        self._stop(count)
        self._start += time.perf_counter() - before

    def values(self) -> Values:
        return {"evaluations": self.evaluations, "seconds": time.perf_counter() - self._start}


class Latent(NamedTuple):
    """x_T and the reconstruction [1, C, H, W] of an image by one recipe."""

    x_T: Tensor
    reconstruction: Tensor
    logits: Tensor | None  # [attributes] of the reconstruction, encoded again


class Picture:
    """An image [1, C, H, W] and what is known about it."""

    def __init__(self, name: str, image: Tensor) -> None:
        self.name, self.image = name, image
        self.z: Tensor | None = None
        self.latents: OrderedDict[Recipe, Latent] = OrderedDict()


class Gone(UserError):
    """An image was kept, and is no longer: the page, which has it, sends it again."""

    def __init__(self, key: str) -> None:
        super().__init__("this image is no longer kept; upload or draw it again")
        self.key = key


class Workbench:
    """A pipeline with the images that its visitors work on.

    pipe: of an autoencoder, or of a prior, which can only be sampled. dataset: images on offer (any of pdae_fast.data;
    None: none). name: of the model, as the page shows it. opening: places of the image that the page opens with, and of
    the one that a path leads to.
    """

    def __init__(
        self, pipe: Pipeline, dataset: Any = None, name: str = "model", opening: Sequence[int] = (0, 1)
    ) -> None:
        self.pipe, self.dataset, self.name = pipe, dataset, name
        count = 0 if dataset is None else len(dataset)
        self.opening = [f"data-{i}" for i in opening if i < count]
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()
        self._draws: OrderedDict[int, few_shot.Draws] = OrderedDict()
        self._pool: dict[str, Tensor] | None = None

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def attributes(self) -> list[str]:
        """Names of the sliders, those that are easily seen first."""
        config = self.pipe.model.config
        if not isinstance(self.pipe.model, Autoencoder) or self.pipe.model.classifier is None:
            return []
        names = list(config.attributes) if config.latent_statistics else []
        return [*(n for n in FIRST if n in names), *(n for n in names if n not in FIRST)]

    @property
    def reach(self) -> float:
        """The scale at which a slider ends."""
        names = self.pipe.model.config.attributes if self.attributes else ()
        found = [float(asked(self.pipe, name, 1.0)[i]) for i, name in enumerate(names)]
        return min(MOST_SCALE, math.ceil(10 * REACH_LOGITS / max(1.0, float(np.median(found or 1)))) / 10)

    def describe(self) -> Values:
        """What this model can do, for the page: menus, sliders, pictures on offer, and ``missing``, in words."""
        model = self.pipe.model
        autoencoder, drawn = isinstance(model, Autoencoder), self._draws_images()
        count = 0 if self.dataset is None else len(self.dataset)
        missing = []
        if not autoencoder:
            missing.append("This is a prior alone, without an encoder: it can be sampled, and nothing else. "
                           "python -m pdae_fast.train pdae makes an autoencoder of it.")  # fmt: skip
        elif not self.attributes:
            missing.append("No attribute classifier, so no sliders: python -m pdae_fast.train classifier makes one.")
        if autoencoder and not drawn:
            missing.append("No latent DPM, so no samples: python -m pdae_fast.train latent makes one.")
        if isinstance(model, DiffAE):
            missing.append("A Diff-AE has no prior and no G: no paths by trajectory, and nothing without G.")
        if autoencoder and not count:
            missing.append("No images on offer: upload one, or start with --input FOLDER.")
        recipes = [{"name": name, "solver": recipe.solver, "ways": ways}
                   for name, recipe in RECIPES.items() if recipe.solver in (ways := self._ways(name))]  # fmt: skip
        return {
            "name": self.name,
            "kind": type(model).__name__,
            "size": model.config.image_size,
            "attributes": self.attributes,
            "reach": self.reach,
            "pictures": [f"data-{i}" for i in range(min(count, SHOWN))],
            "opening": self.opening,
            "total": count,
            "recipes": recipes,
            "solvers": [name for name, solver in SOLVERS.items() if not solver.draws],
            "kinds": [kind for kind in INTERPOLATIONS if isinstance(model, PDAE) or kind == "latent"],
            "autoencoder": autoencoder,
            "samples": drawn or not autoencoder,
            "latent_dpm": drawn,
            "few_shot": drawn and count > 0,
            "limits": {"bytes": MOST_BYTES, "images": MOST_IMAGES, "frames": MOST_FRAMES},
            "missing": missing,
        }

    def _ways(self, name: str) -> dict[str, Values]:
        """Of each solver that a recipe may run with: what the two do, in words, and evaluations."""
        ways: dict[str, Values] = {}
        for solver in SOLVERS:
            with contextlib.suppress(UserError):
                (recipe := recipe_of(name, solver)).check(self.pipe.schedule)
                ways[solver] = {"text": str(recipe), "evaluations": recipe.evaluations(self.pipe.schedule, True)}
        return ways

    def _draws_images(self) -> bool:
        try:
            self.pipe.latent_settings()
        except UserError:
            return False
        return True

    # -- images ----------------------------------------------------------------------------------------------------

    def upload(self, content: bytes, name: str = "upload") -> Values:
        """Read an image file, like every other image of this project, and keep it; its key and the image.

        UserError for what is no image, broken, empty or too large.
        """
        size = stored_size("upload", content) if len(content) <= MOST_BYTES else None
        if len(content) > MOST_BYTES or (size and size[0] * size[1] > MOST_PIXELS):
            raise UserError(
                f"{_short(name)}: too large; at most {MOST_BYTES >> 20} MiB and {MOST_PIXELS // 10**6} megapixels"
            )
        channels, side, _ = self.pipe.model.image_shape
        # One of the model's own size is whole: such as a drawn one that the page sends again.
        crop = "centre" if size == (side, side) else self.pipe.model.config.crop
        return self.keep(load_image(_short(name), side, channels, content=content, crop=crop), _short(name))

    def keep(self, image: Tensor, name: str) -> Values:
        """Keep ``image`` [C, H, W] under a new key that cannot be guessed."""
        key = f"kept-{secrets.token_hex(8)}"
        self._put(key, Picture(name, image[None].clamp(-1, 1)))
        return {"key": key, "name": name, "image": image}

    def _put(self, key: str, picture: Picture) -> Picture:
        with self._lock:
            picture = self._pictures.setdefault(key, picture)
            self._pictures.move_to_end(key)
            while len(self._pictures) > KEPT_IMAGES:
                self._pictures.popitem(last=False)
        return picture

    def picture(self, key: Any) -> Picture:
        """The image that a key stands for; UserError where there is none, or no longer."""
        with self._lock:
            if isinstance(key, str) and key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        return self._put(key, self.offered(key))

    def offered(self, key: Any) -> Picture:
        """An image of the data set, "data-NUMBER", read anew."""
        word, _, number = key.partition("-") if isinstance(key, str) else ("", "", "")
        if word == "kept":
            raise Gone(key)
        if word != "data" or not (number.isdecimal() and len(number) < 10) or self.dataset is None:
            raise UserError(f"no image {brief(key)}")
        if int(number) >= len(self.dataset):
            raise UserError(f"no image {brief(key)}; there are {len(self.dataset)}")
        try:
            found = self.dataset[int(number)]
        except BrokenImage as error:  # whose text has the file's place
            raise UserError(f"image {number}: {error.reason}") from None
        return Picture(found.name, found.image[None])

    # -- what an image costs once ----------------------------------------------------------------------------------

    def _z(self, picture: Picture) -> Tensor:
        if picture.z is None:
            picture.z = self.pipe.encode(picture.image)
        return picture.z

    def _with(self, recipe: Recipe, stop: Stop) -> Pipeline:
        pipe = self.pipe.with_recipe(recipe)
        pipe.progress = stop
        return pipe

    def latent(self, picture: Picture, recipe: Recipe, stop: Stop = never, again: bool = False) -> Latent:
        """x_T and the reconstruction by ``recipe``: those that are kept, or (``again``) anew."""
        if again or recipe not in picture.latents:
            pipe, z = self._with(recipe, stop), self._z(picture)
            x_T = pipe.invert(picture.image, z)
            x = check_finite(pipe.decode(z, x_T), "the reconstruction holds")
            logits = self._logits(x) if self.attributes else None
            picture.latents[recipe] = Latent(x_T, x, logits)
            while len(picture.latents) > KEPT_LATENTS:
                picture.latents.popitem(last=False)
        picture.latents.move_to_end(recipe)
        return picture.latents[recipe]

    def _logits(self, x: Tensor) -> Tensor:
        """What the classifier says of x [1, C, H, W], encoded again."""
        return self.pipe.logits(self.pipe.encode(x))[0]

    # -- requests --------------------------------------------------------------------------------------------------

    def reconstruct(self, key: Any, recipe: Recipe, stop: Stop = never) -> Values:
        """An image encoded and decoded by ``recipe``, timed anew: what the recipe costs and what it leaves."""
        picture, spent = self.picture(key), Spent(stop)
        found = self.latent(picture, recipe, spent, again=True)
        about = {"recipe": str(recipe), **spent.values(), **self._quality(picture, found)}
        return {"image": found.reconstruction[0], **about}

    def _quality(self, picture: Picture, found: Latent) -> Values:
        clamped = found.reconstruction.clamp(-1, 1)
        return {"mse": float(metrics.mse(picture.image, clamped)), "ssim": float(metrics.ssim(picture.image, clamped))}

    def _scales(self, scales: Any) -> dict[str, float]:
        if not isinstance(scales, Mapping):
            raise UserError("scales must name attributes with numbers")
        for name in scales:
            if name not in self.attributes:
                raise UserError(f"attribute {brief(name)} is not known")
        found = {name: as_number(f"the scale of {name}", value, -MOST_SCALE, MOST_SCALE)
                 for name, value in scales.items()}  # fmt: skip
        return {name: value for name, value in found.items() if value}

    def _edited(self, z: Tensor, scales: Mapping[str, float]) -> Tensor:
        for name, scale in scales.items():
            z = self.pipe.edit(z, name, scale)
        return z

    def edit(self, key: Any, scales: Any, recipe: Recipe, stop: Stop = never) -> Values:
        """An image with several attributes moved at once, from its inferred x_T, and how much of it arrives.

        ``attributes``: for each that was moved, the change of its logit that the edit of z asks for, and the change
        after decoding and encoding again, against the reconstruction encoded again; and the probabilities.
        ``evaluations`` and ``seconds`` are what this request took: what is kept costs nothing.
        """
        picture, scales, spent = self.picture(key), self._scales(scales), Spent(stop)
        found, z = self.latent(picture, recipe, spent), self._z(picture)
        pipe = self._with(recipe, spent)
        x = pipe.decode(self._edited(z, scales), found.x_T) if scales else found.reconstruction
        check_finite(x, "the edited image holds")
        values: Values = {
            "original": picture.image[0],
            "reconstruction": found.reconstruction[0],
            "edit": x[0],
            "name": picture.name,
            "recipe": str(recipe),
            "steps": recipe.steps,
            **self._quality(picture, found),
            "attributes": {},
        }
        if scales:
            before, after = found.logits, self._logits(x)
            names = self.pipe.model.config.attributes
            wanted = sum(asked(self.pipe, name, scale) for name, scale in scales.items())
            for name in scales:
                i = names.index(name)
                values["attributes"][name] = {
                    "asked": float(wanted[i]),
                    "arrived": float(after[i] - before[i]),
                    "before": float(before[i].sigmoid()),
                    "after": float(after[i].sigmoid()),
                }
        return {**values, **spent.values()}

    def latents(self, key: Any, scales: Any, recipe: Recipe, stop: Stop = never) -> bytes:
        """A .safetensors file of z, the edited z and x_T of an image, with how they were made as its metadata."""
        picture, scales = self.picture(key), self._scales(scales)
        found, z = self.latent(picture, recipe, stop), self._z(picture)
        tensors = {"z": z, "z_edited": self._edited(z, scales), "x_T": found.x_T}
        about = {"model": self.name, "recipe": str(recipe), "image": picture.name,
                 **{f"scale of {name}": f"{scale:g}" for name, scale in scales.items()}}  # fmt: skip
        return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, about)

    def interpolate(self, a: Any, b: Any, kind: Any, count: Any, recipe: Recipe, stop: Stop = never) -> Values:
        """``count`` frames from image ``a`` to image ``b``, and the film, there and back, as a GIF's bytes."""
        first, second = self.picture(a), self.picture(b)
        weights = torch.linspace(0, 1, as_int("frames", count, 2, MOST_FRAMES))
        spent = Spent(stop)
        pipe = self._with(recipe, spent)
        ends = [self.latent(picture, recipe, spent) for picture in (first, second)]
        z, x_T = (torch.stack(v) for v in ([self._z(first), self._z(second)], [end.x_T for end in ends]))
        frames = check_finite(pipe.blend(z, x_T, weights, kind)[0], "the images between hold")
        return {"frames": list(frames), "gif": animation.gif(frames[None]), **spent.values()}

    def sample(
        self,
        count: Any,
        seed: Any,
        recipe: Recipe,
        attribute: Any = None,
        without: bool = False,
        like: Any = (),
        stop: Stop = never,
    ) -> Values:
        """``count`` new images, kept under keys of their own: any; or with (``without``: without) an attribute of the
        classifier, as few_shot accepts them (``rate``: the share of the draws); or those of ALIKE_DRAWS that are most
        like the images of the keys ``like``, by a few-shot classifier."""
        count = as_int("images", count, 1, MOST_IMAGES)
        seed = as_int("seed", seed, 0, MOST_SEED)
        spent, rate = Spent(stop), None
        pipe = self._with(recipe, spent)
        if not isinstance(pipe.model, Autoencoder) or (attribute is None and not like):
            x = pipe.sample(count, seed=seed, latent_steps=self._latent_steps)
        else:
            draw = self._numbered(seed, spent)
            if like:
                alike = self._like(like, spent)
                z = draw(0, ALIKE_DRAWS)
                numbers = np.argsort(-alike(z), kind="stable")[:count].tolist()
                z = z[numbers]
            else:
                z, numbers, rate = self._accepted(draw, self._attribute(attribute, bool(without)), count, seed)
            x = pipe.decode(z, None, 0.3, seed=seed, indices=numbers)
        check_finite(x, "the sampled images hold")
        return {
            "images": [self.keep(image, f"drawn {seed}/{i}") for i, image in enumerate(x)],
            "rate": rate,
            "best_of": ALIKE_DRAWS if like else None,
            **spent.values(),
        }

    def _accepted(self, draw: Any, p: Any, count: int, seed: int) -> tuple[Tensor, list[int], float]:
        try:
            found = few_shot.reject(draw, p, count, MOST_DRAWS, seed)
        except UserError as error:  # whose advice is for a command
            why = str(error).partition(";")[0]
            raise UserError(f"{why}; ask for fewer or for something else") from None
        return found.z, found.numbers, found.rate

    @property
    def _latent_steps(self) -> int | None:
        """Of the latent DPM; None: a Diff-AE's own."""
        return LATENT_STEPS if isinstance(self.pipe.model, PDAE) else None

    def _numbered(self, seed: int, stop: Stop) -> Callable[[int, int], Tensor]:
        draws = self._draws.setdefault(seed, few_shot.Draws(self.pipe, self._latent_steps, seed=seed))
        self._draws.move_to_end(seed)
        while len(self._draws) > 4:
            self._draws.popitem(last=False)

        def draw(first: int, count: int) -> Tensor:
            stop(0)
            return draws(first, count)

        return draw

    def _attribute(self, name: Any, without: bool) -> Callable[[Tensor], np.ndarray]:
        if name not in self.attributes:
            raise UserError(f"attribute {brief(name)} is not known")
        place, sign = self.pipe.model.config.attributes.index(name), -1 if without else 1
        return lambda z: (sign * self.pipe.logits(z)[:, place]).sigmoid().double().numpy()

    def _like(self, keys: Any, stop: Stop) -> Callable[[Tensor], np.ndarray]:
        if not isinstance(keys, Sequence) or isinstance(keys, str) or not 1 <= len(keys) <= SHOWN:
            raise UserError(f"expected 1 to {SHOWN} images to be like")
        if self.dataset is None:
            raise UserError("sampling like a few images needs others to tell them from; start with --input FOLDER")
        mean, std = (v.detach().cpu() for v in (self.pipe.model.latent_mean, self.pipe.model.latent_std))
        positives = torch.cat([self._z(self.picture(key)) for key in keys])
        if self._pool is None:
            pool = {}
            for i in range(min(POOL, len(self.dataset))):
                stop(0)
                pool[f"data-{i}"] = self.pipe.encode(self.offered(f"data-{i}").image)
            self._pool = pool
        others = [z for key, z in self._pool.items() if key not in keys]
        if not others:
            raise UserError("every image on offer was chosen: there is nothing to tell them from")
        normal = [((z - mean) / std).numpy() for z in (positives, torch.cat(others))]
        classifier = few_shot.fit(*normal, ALIKE_L2)
        return lambda z: few_shot.probability(classifier, ((z - mean) / std).numpy())

    def inside(self, key: Any, count: Any, stop: Stop = never) -> Values:
        """x_t of an image at ``count`` times, x0_hat from it in one step with and without G, and G: pictures, and the
        errors and sizes behind them (analyze.shift)."""
        picture, schedule = self.picture(key), self.pipe.schedule
        times = time_grid(schedule.T, as_int("times", count, 2, MOST_TIMES))
        shape, rows = picture.image.shape[1:], []
        for point in points(self.pipe, picture.image, times, lambda t: noise_at(0, t, [0], shape), stop):
            without, with_g = (x.cpu() for x in shift.one_step(schedule, point))
            row = {"t": point.t, "x_t": point.x_t[0].cpu(), "with": with_g[0],
                   "with_mse": float(metrics.mse(picture.image, with_g))}  # fmt: skip
            if point.gradient is not None:
                size = shift.shift_size(schedule, point)
                row |= {
                    "without": without[0],
                    "without_mse": float(metrics.mse(picture.image, without)),
                    "G": shift.pictures_of_g(point)[0].cpu(),
                    "shift": float(size["shift"]),
                    "missing": float(size["missing"]),
                }
            rows.append(row)
        return {"original": picture.image[0], "rows": rows}


def recipe_of(name: Any = "fast", solver: Any = None, steps: Any = None) -> Recipe:
    """The recipe of a name in RECIPES, or "preview"; with another solver, or other steps. UserError for others."""
    if name == "preview":
        return PREVIEW
    if not isinstance(name, str) or name not in RECIPES:
        raise UserError(f"recipe {brief(name)} is not known; expected one of {', '.join(RECIPES)}")
    recipe, fields = RECIPES[name], {}
    if steps is not None:
        fields["steps"] = as_int("steps", steps, 1, MOST_STEPS)
    if solver is not None and solver != recipe.solver:
        if not isinstance(solver, str) or solver not in SOLVERS:
            raise UserError(f"solver {brief(solver)} is not known; expected one of {', '.join(SOLVERS)}")
        if recipe.method.backward:
            raise UserError(f"the recipe {name} is made for the solver {recipe.solver}; choose another for {solver}")
        # x_T is inferred as the solver does it.
        fields |= {"solver": solver, "iterations": None, "encode_steps": None}
    return Recipe.of(recipe, **fields)


def _short(name: str) -> str:
    """An uploaded file's name as messages show it: its last part, at most 60 characters."""
    return str(name).replace("\\", "/").rsplit("/", 1)[-1][:60] or "upload"
