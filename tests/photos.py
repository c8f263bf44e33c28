"""Real photographs that ship inside scikit-image and scikit-learn, by path; neither is imported."""

import shutil
from importlib.util import find_spec
from pathlib import Path


def photo(name: str) -> Path:
    """The file of one of their sample images, such as chelsea.png or china.jpg."""
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is in the extra `test`"
        path = Path(spec.origin).parent / folder / name
        if path.is_file():
            return path
    raise FileNotFoundError(name)


PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg")


def copy_photos(folder: Path, names: tuple[str, ...] = PHOTOS) -> None:
    """Copies of them in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(photo(name), folder / name)
