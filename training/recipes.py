"""Recipes by name: what happens to a clean image, stage by stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..nets.registry import nearest
from .blur_stage import Blur
from .stage import Draws, Stage
from .stages import CameraNoise, Downsample, Jpeg, Noise


@dataclass(frozen=True)
class Recipe:
    """A way to degrade images: stages that follow each other, each with numbers that are drawn for each sample.

    Args:
        name: by which `degrade` finds it, once it is registered.
        stages: in their order; one of them, such as `Downsample`, must shrink the image by the scale.
        rounded: whether the result is clamped to [0, 1] and rounded to 8 bits.
        order: draws another order of the stages for a sample, as a list of their places.

    Raises:
        ValueError: if there is no name or two stages have the same.

    >>> [stage.name for stage in find_recipe("mild").stages]
    ['downsample', 'noise', 'jpeg']
    """

    name: str
    stages: tuple[Stage, ...]
    rounded: bool = True
    order: Callable[[Draws], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not self.name:
            raise ValueError("name of a recipe must not be empty")
        if len(set(names)) < len(names):
            raise ValueError(f"stages of {self.name} must have names that differ, got {', '.join(names)}")


_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> None:
    """Make a recipe known by its name.

    Raises:
        TypeError: if it is no `Recipe`.
        ValueError: if another recipe has its name.

    >>> register_recipe(Recipe("faint", (Downsample(), Noise(sigma=(0, 2 / 255)))))
    >>> find_recipe("faint").rounded
    True
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
    if _RECIPES.get(recipe.name, recipe) != recipe:
        raise ValueError(f"the recipe name {recipe.name!r} is taken")
    _RECIPES[recipe.name] = recipe


def list_recipes() -> list[str]:
    """Names that `find_recipe` knows, sorted.

    >>> "real-esrgan" in list_recipes()
    True
    """
    return sorted(_RECIPES)


def find_recipe(recipe: str | Recipe) -> Recipe:
    """Find a recipe by its name; a recipe is given back as it is.

    Raises:
        ValueError: if no recipe has that name; it offers the nearest.

    >>> find_recipe("jpeg10").stages[-1].quality
    (10, 10)
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in _RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}{nearest(recipe, _RECIPES)}")
    return _RECIPES[recipe]


def _photographs(name: str, share: float) -> Recipe:
    """Faults that a share of photographs have each, and half of them faint ones too."""
    return Recipe(
        name,
        (
            Blur(probability=share, sigma=(0.0, 1.5), sizes=(13,)),
            Downsample(),
            Noise(probability=share, sigma=(0.0, 30 / 255)),
            Noise(name="grain", probability=0.5, sigma=(0.0, 3 / 255)),
            Jpeg(probability=share, quality=(40, 95)),
            Jpeg(name="fine", probability=0.5, quality=(85, 100)),
        ),
    )


def _register_plain() -> None:
    """The recipes of this kit; those of papers are in `published`."""
    as_in_test_sets = Downsample(rounded=True)

    def alone(name: str, stage: Stage, *, rounded: bool) -> Recipe:
        return Recipe(name, (as_in_test_sets, stage), rounded)

    recipes = [
        Recipe("clean", (as_in_test_sets,), rounded=False),
        Recipe("mild", (Downsample(), Noise(sigma=(1 / 255, 1 / 255)), Jpeg(quality=(95, 95)))),
        Recipe(
            "joint",
            (
                Blur(probability=0.8, sigma=(0.0, 1.5), sizes=(13,)),
                Downsample(),
                Noise(probability=0.8, sigma=(0.0, 30 / 255)),
                Jpeg(probability=0.8, quality=(40, 95)),
            ),
        ),
        # A net that shall leave good photographs alone must see some. Of joint's samples one in 125 has no fault, and
        # faint ones are as rare. Here one in 32 or one in 10 has none, and one in 10 or two in 5 have nothing but faint
        # grain or a fine JPEG.
        _photographs("photographs", 0.5),
        _photographs("good-photographs", 0.25),
        Recipe(
            "stress",
            (
                Blur(probability=0.9, families=(("iso", 0.4), ("aniso", 0.4), ("motion", 0.2)), sigma=(0.5, 3.0)),
                Downsample(),
                Noise(probability=0.9, sigma=(10 / 255, 50 / 255), poisson=0.3, factor=(1.0, 4.0), grey=0.3, clip=True),
                Jpeg(probability=0.9, quality=(10, 60)),
            ),
        ),
        # Each type alone, for evaluation: noise is neither clamped nor rounded, as in the tables of papers.
        *(alone(f"noise{level}", Noise(sigma=(level / 255, level / 255)), rounded=False) for level in (15, 25, 50)),
        alone("poisson", Noise(poisson=1.0), rounded=False),
        alone("camera", CameraNoise(), rounded=True),
        *(alone(f"jpeg{quality}", Jpeg(quality=(quality, quality)), rounded=True) for quality in (10, 20, 30, 40)),
        Recipe("blur", (Blur(sigma=(1.6, 1.6)), Downsample())),
        Recipe("motion", (Blur(families=(("motion", 1.0),)), Downsample())),
    ]
    for recipe in recipes:
        register_recipe(recipe)


_register_plain()
