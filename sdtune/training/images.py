"""Reads a picture file as an upright RGB picture, and says in a sentence what is wrong with one that cannot be read."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
# Files that users take for pictures and that are not read: told as problems, where other files are only mentioned.
UNREAD_SUFFIXES = set(".heic .heif .jxl .svg .psd .xcf .eps .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split())


def explain_image_error(error: Exception) -> str:
    """What is wrong with a picture that does not open, and what to do."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, more than {2 * Image.MAX_IMAGE_PIXELS:,}; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "damaged, or of a format that is not read; save it as PNG or JPEG"
    if isinstance(error, OSError) and error.filename:
        return f"cannot be opened ({error.strerror}); check the link or the permissions"
    return f"damaged or truncated ({error}); copy or save it again"


def open_file(file: str | Path | BinaryIO) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """An upright RGB picture: EXIF rotation applied, 16 bits brought to 8, alpha laid on white.

    Raises:
        OSError, ValueError, or another exception of Pillow's: if the file is damaged or of a format not read.
    """
    image = source if isinstance(source, Image.Image) else open_file(source)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float greys, which convert("RGB") would clip
        grey = np.nan_to_num(np.asarray(image).astype(np.float32))
        most = float(grey.max())
        top = next((t for t in ((1, 255, 65535) if image.mode == "F" else (65535,)) if most <= t), most)
        grey[grey == image.info.get("transparency")] = top
        return Image.fromarray((grey / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    """The middle square of an image at side x side pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
