"""Opens image files as upright RGB images, and explains why a file cannot be opened."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

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


def check_sums(content: bytes) -> None:
    """Raises an exception of Pillow if a part of a PNG differs from its checksum, which is ignored in reading."""
    with open_file(io.BytesIO(content)) as image:
        if image.format == "PNG":
            image.verify()


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """An upright sRGB image: EXIF rotation is applied, 16 bits are scaled to 8, and transparent parts become white.

    Colours are converted from the image's embedded profile, if it has one that can be used (`explain_profile`).

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
    has_transparency = image.has_transparency_data
    image = _convert_to_srgb(image)
    if has_transparency:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def explain_profile(image: Image.Image) -> str:
    """Why the colour profile of an image cannot be used; empty if it can, or if there is none."""
    try:
        transform = _srgb_transform(image)
        if transform:
            transform.apply(Image.new(transform.input_mode, (1, 1)))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _srgb_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The transform from an image's profile to sRGB, or None if it has none or it is sRGB already.

    Raises:
        PyCMSError, OSError or ValueError: if the profile is damaged or does not belong to this kind of image.
    """
    content = image.info.get("icc_profile")
    if not content or image.mode.startswith("I") or image.mode == "F":
        return None
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    mode = {"CMYK": "CMYK", "LAB": "LAB", "L": "L", "LA": "L", "1": "L"}.get(image.mode, "RGB")
    space = profile.profile.xcolor_space.strip()
    if space == "GRAY" and mode == "RGB" and image.mode != "P":
        mode = "L"  # an RGB picture of which the profile says that it is grey
    if {"CMYK": "CMYK", "LAB": "Lab", "L": "GRAY", "RGB": "RGB"}[mode] != space:
        raise ValueError(f"a profile for {space} in a picture of mode {image.mode}")
    if (ImageCms.getProfileDescription(profile) or "").strip().startswith("sRGB"):
        return None
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")


def _convert_to_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours of sRGB, RGB or RGBA; as it is if its profile cannot be used or it has none."""
    try:
        transform = _srgb_transform(image)
        if transform is None:
            return image
        plain = image.convert("RGBA") if image.mode == "P" else image
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        converted = transform.apply(plain.convert(transform.input_mode))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def crop_to_shape(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The largest part in the middle of an image with the aspect ratio of `shape`, resized to it: width and height."""
    return ImageOps.fit(image, shape, Image.Resampling.LANCZOS)
