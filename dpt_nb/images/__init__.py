"Files and images in and out, and colors for maps."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "colors": ["color_depth", "color_label", "show_images", "show_label"],
        "images": ["read_depth", "read_image", "read_label", "write_depth", "write_image", "write_label"],
    },
)
