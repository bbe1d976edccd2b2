"""Opens image files as upright RGB images, and explains why a file cannot be opened."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
# image formats that are not read: such a file is reported as a problem, while other files are only noted
UNREAD_SUFFIXES = set(".heic .heif .jxl .svg .psd .xcf .eps .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split())


def explain_image_error(error: Exception) -> str:
    """A sentence that says what is wrong with an image that does not open, and what to do."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, more than {2 * Image.MAX_IMAGE_PIXELS:,}; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "damaged, or of a format that is not read; save it as PNG or JPEG"
    if isinstance(error, OSError) and error.filename:
        return f"cannot be opened ({error.strerror}); check the link or the permissions"
    return f"damaged or truncated ({error}); copy or save it again"


def open_file(file: str | Path | BinaryIO) -> Image.Image:
    """Opens an image file with Pillow, as it is, if its format is one of `FORMATS`."""
    Image.init()
    return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """An upright RGB image: EXIF rotation is applied, 16 bits are scaled to 8, and transparent parts become white.

    Raises:
        OSError, ValueError, or another exception of Pillow: if the file is damaged or its format is not read.
    """
    image = source if isinstance(source, Image.Image) else open_file(source)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float grey, which convert("RGB") would clip
        grey = np.nan_to_num(np.asarray(image).astype(np.float32))
        brightest = float(grey.max())
        possible_whites = (1, 255, 65535) if image.mode == "F" else (65535,)
        white = next((w for w in possible_whites if brightest <= w), brightest)
        grey[grey == image.info.get("transparency")] = white
        return Image.fromarray((grey / white * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle of an image, resized to side x side pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
