"""The stages after training: evaluation classifier, samples, and their metrics against held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sfd.evaluation.evaluate import Metrics, evaluate, evaluate_real, read_metrics
from sfd.evaluation.extractors.classifier import ClassifierExtractor, load_classifier
from sfd.evaluation.reference import RealImages, Reference, reference_of
from sfd.evaluation.samples import load_samples
from sfd.generation.config import SamplingConfig
from sfd.generation.folder import image_path, write_grid, write_samples
from sfd.generation.model import Model
from sfd.models.component import CONFIG_FILE
from sfd.run.images import RunImages
from sfd.run.stages import Run, Stage
from sfd.run.transformer import TransformerStage
from sfd.training.tasks.classifier import ClassifierSettings, divide, train_classifier
from sfd.utils import distributed
from sfd.utils.errors import SFDError


class EvaluatorStage(Stage[Run]):
    """Trains the evaluation classifier, on images that nothing else in the run sees."""

    def __init__(self, run: Run, images: RunImages) -> None:
        self.images, settings = images, run.recipe.evaluation.classifier
        name, command, fields = "evaluation classifier", "sfd train-evaluator", ("data", "evaluation.classifier")
        super().__init__(run, name, command, run.folder.evaluator, fields, settings.training if settings else None)

    def needed(self) -> bool:
        """Whether the recipe has an evaluation classifier."""
        return self.run.recipe.evaluation.classifier is not None

    def inputs(self) -> dict[str, Any]:
        """The images."""
        return self.images.identity()

    def results(self) -> tuple[Path, ...]:
        """The classifier."""
        return (self.folder / "extractor" / CONFIG_FILE,)

    def work(self) -> None:
        """Train the classifier."""
        network = train_classifier(self.images.held_out, self._settings, self.folder, device=self.run.device)
        if distributed.is_main_process():
            network.save(self.folder / "extractor")

    @cached_property
    def extractor(self) -> ClassifierExtractor:
        """The trained classifier."""
        _ = self._settings
        self.require()
        return load_classifier(self.folder / "extractor", self.run.device)

    def reference_images(self) -> RealImages:
        """Real images that neither the model nor the evaluation classifier was trained on."""
        _, images = divide(self.images.held_out, self._settings)
        return RealImages("held-out real images", images.identity, images)

    def reference(self) -> Reference:
        """The features of these images by the classifier."""
        real = self.reference_images()
        assert real.images is not None
        return reference_of(real.images, self.extractor, real.name)

    @property
    def _settings(self) -> ClassifierSettings:
        settings = self.run.recipe.evaluation.classifier
        if settings is None:
            raise SFDError(
                f"recipe {self.run.recipe.name!r} has no evaluation.classifier; "
                "measure its samples with `sfd evaluate SAMPLES --reference …`, or set evaluation.classifier={}"
            )
        return settings


class SamplesStage(Stage[Run]):
    """Samples every class, with the recipe's guidance or with the conditional model alone."""

    def __init__(
        self,
        run: Run,
        variant: Literal["guided", "unguided"],
        transformer: TransformerStage,
        guiding: Callable[[], Model | None] = lambda: None,
    ) -> None:
        self.variant, self.transformer, self.guiding, self.sources = variant, transformer, guiding, (transformer,)
        folder, fields = run.folder.samples / variant, ("evaluation.samples_per_class", "evaluation.seed")
        super().__init__(run, f"{variant} samples", "sfd report", folder, fields)
        sample = run.recipe.sample if variant == "guided" else run.recipe.sample.unguided()
        self.fields["sample"] = sample.fixed()

    def distinct(self) -> bool:
        """Whether these samples are wanted: without guidance there is one kind of them."""
        settings = self.run.recipe.sampling(self.model.classes)
        guides = settings != settings.unguided()
        return guides if self.variant == "guided" else self.run.recipe.evaluation.unguided or not guides

    @property
    def model(self) -> Model:
        """What is sampled."""
        return self.transformer.model

    @property
    def settings(self) -> SamplingConfig:
        """Solver, steps, guidance."""
        settings = self.run.recipe.sampling(self.model.classes)
        return settings if self.variant == "guided" else settings.unguided()

    @property
    def labels(self) -> list[int]:
        """Class of each image; the images of a class follow one another."""
        return [label for label in self.model.labels for _ in range(self.run.recipe.evaluation.samples_per_class)]

    def inputs(self) -> dict[str, Any]:
        """The model, and the one that guides it."""
        guiding = self.guiding()
        return {"model": self.model.identity, "guiding model": guiding.identity if guiding else None}

    def results(self) -> list[Path]:
        """The images."""
        count = len(self.labels)
        return [image_path(self.folder, number, count) for number in range(count)]

    def work(self) -> None:
        """Sample the images; draw some of them as a grid."""
        first, labels = self.run.recipe.evaluation.seed, self.labels
        seeds = range(first, first + len(labels))
        write_samples(self.folder, self.model, labels, seeds, self.settings, guiding=self.guiding())
        distributed.barrier()  # after a change of their number one rank may be hours behind the others
        if distributed.is_main_process():
            write_grid(self.folder, labels, self.model.classes)


class MetricsStage(Stage[Run]):
    """Measures samples, and real training images, against held-out images."""

    together = False

    def __init__(self, run: Run, samples: Sequence[SamplesStage], evaluator: EvaluatorStage, images: RunImages) -> None:
        self.samples, self.evaluator, self.images, self.sources = samples, evaluator, images, (*samples, evaluator)
        fields = ("seed", "data", "sample", "evaluation")
        super().__init__(run, "metrics", "sfd report", run.folder.metrics, fields)

    def needed(self) -> bool:
        """Whether there is a classifier to measure by."""
        return self.evaluator.needed()

    def inputs(self) -> dict[str, Any]:
        """What made the samples, and the classifier."""
        return self.samples[0].inputs() | {"evaluator": self.evaluator.extractor.identity}

    def results(self) -> list[Path]:
        """A file of metrics for each kind of samples, and one for real images."""
        names = [*(stage.name for stage in self.samples), "real training images"]
        return [self.folder / f"{name.replace(' ', '-')}.json" for name in names]

    def work(self) -> None:
        """Measure the samples, and real training images as if they were samples."""
        reference, rows = self.evaluator.reference(), []
        for stage in self.samples:
            samples = load_samples(stage.folder)
            labels = samples.labels_among(self.evaluator.extractor.classes)
            rows.append(evaluate(samples.images, labels, reference, name=stage.name, sampling=samples.sampling))
        rows.append(evaluate_real(self.images.training, reference, rows[0].n_samples, self.run.recipe.seed))
        for row, path in zip(rows, self.results(), strict=True):
            row.write(path)

    def metrics(self) -> list[Metrics]:
        """What was measured, one row for each kind of samples, then real images."""
        return [read_metrics(path) for path in self.results()] if self.needed() else []
