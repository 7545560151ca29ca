"Explorers for JupyterLab, and the course: exercises, quizzes, progress."
import lazy_loader

# A name is imported when it is asked for: reading `--help` does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": ["Comparison"],
        "course": ["course_progress"],
        "loss_lab": ["LossLab"],
        "pages": ["Explorer"],
        "scene_maker": ["SceneMaker"],
        "tabs": ["Workbench"],
        "training_room": ["TrainingRoom"],
    },
)
