"Recipes, the loop, many processes."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "compare_runs": ["compare_runs"],
        "launch": ["launch"],
        "run": ["train"],
        "recipe_fields": ["Recipe", "change_recipe"],
        "recipe_files": ["read_recipe", "write_recipe"],
        "recipes": ["get_recipe", "recipe_table"],
        "run_again": ["resume_run"],
    },
)
