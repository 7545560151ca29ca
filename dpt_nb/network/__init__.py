"From tokens to depth, labels and normals."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backbone": ["Backbone"],
        "config": ["DPTConfig"],
        "dpt": ["DPT"],
        "fusion": ["Decoder"],
        "heads": ["DepthHead", "register_head"],
        "reassemble": ["Reassemble"],
        "zoo": ["count_parameters", "create_model", "list_models"],
    },
)
