"""The settings of a training run, typed: what a YAML file and the command line say."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml


@dataclass
class Stage:
    """One stage of training.

    Args:
        train: the classifier alone, head and classifier, everything, or the backbone alone; the
            rest is frozen.
        layers: the backbone's modules that are trained, such as conv_head or blocks.6, while its
            rest is frozen, in evaluation mode; empty for all of it.
        unsupervised: the loss is the head's unsupervised loss alone; no label is read, and the
            classifier is frozen. Before each step the head updates itself by its own rule, if it
            has one; a last batch of too few images is left out. After a supervised stage only last/
            gets what it learns: model/ keeps the epoch of the best validation accuracy.
        loss: empty for cross-entropy; or a loss of pytorch-metric-learning, the name of its class
            and its arguments, such as {name: MultiSimilarityLoss, alpha: 2.0}, on vectors of unit
            length. The classifier is frozen then, and epochs are compared by recall@1.
        miner: of pairs or triplets, likewise; empty for none.
        per_class: images of a class that follow each other in a batch, of which batch_size is a
            multiple; 0 for batches at random.
        epochs: passes over the training set.
        opt: optimizer, any that timm.optim knows; sgd is Nesterov's, momentum the plain one.
        lr: learning rate.
        head_lr_scale: factor on the learning rate of head and classifier.
        momentum: of SGD.
        weight_decay: not applied to biases and other vectors.
        sched: schedule of the learning rate, per step; plateau watches the loss of each epoch.
        warmup_epochs: linear warm-up from zero (not with plateau).
        decay_epochs: interval of the step schedule.
        decay_rate: factor of the step and plateau schedules.
        patience_epochs: epochs without a lower training loss before plateau decays.
        min_lr: where cosine and plateau end.
        head_loss: weight of the head's unsupervised loss; in an unsupervised stage 0 stands for 1.
        label_smoothing: of the cross-entropy.
        clip_grad: largest norm of the gradient; null for none.
        freeze_bn: keep the statistics of the backbone's batch norms, as in evaluation.
    """

    train: Literal['classifier', 'head', 'all', 'backbone'] = 'all'
    layers: list[str] = field(default_factory=list)
    unsupervised: bool = False
    loss: dict[str, Any] = field(default_factory=dict)
    miner: dict[str, Any] = field(default_factory=dict)
    per_class: int = 0
    epochs: int = 10
    opt: str = 'adamw'
    lr: float = 1e-3
    head_lr_scale: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    sched: Literal['constant', 'cosine', 'step', 'plateau'] = 'cosine'
    warmup_epochs: int = 0
    decay_epochs: int = 30
    decay_rate: float = 0.1
    patience_epochs: int = 3
    min_lr: float = 0.0
    head_loss: float = 0.0
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    freeze_bn: bool = False

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone, or some layers of it, are trained."""
        return self.train in ('all', 'backbone')


@dataclass
class Config:
    """Train a pooling head on a timm backbone: fit, then the stages, then evaluate and save.

    Args:
        output: folder of the run.
        resume: continue the run in this folder exactly where its last checkpoint is.
        data_dir: folder with train/, val/ and test/, one subfolder per class; or the root of a
            torch/ or hfds/ data set; or a file of arrays.
        dataset: empty for such a folder, torch/NAME or hfds/NAME as timm takes them, digits (those
            of scikit-learn), or npz for FILE.npz with images and labels x_train, y_train, x_test
            and y_test, or x and y: images [n, H, W] or [n, H, W, C], uint8 or float from 0 to 1,
            labels [n], integers or strings. Streams are wds/NAME, the shards of webdataset in
            data_dir, and hfids/NAME, a folder or a data set on the Hub, with data_dir for its
            cache.
        input_key: column of the images, of hfds, hfids and wds; null for the usual one.
        target_key: column of the labels, likewise.
        classes: names of the classes, of a stream or hfds that does not give them.
        train_samples: images of a training split that is streamed; null for what the data set says,
            or to count them.
        train_split: name of the training split.
        val_split: name of the validation split; null carves it from the training split, as is
            always done for npz.
        test_split: name of the test split; null for none.
        val_fraction: share of the training split that is carved off, stratified by class.
        test_fraction: share of the images of an .npz with x and y alone that is the test split,
            stratified by class and always the same.
        folds: number of parts, stratified by class, to cut such an .npz into instead; 0 for none.
        fold: which of them, from 0, is the test split.
        max_train: at most this many training images, at random but always the same, before
            validation images are carved off; null for all.
        max_test: at most this many test images, likewise.
        max_fit: at most this many images that a head starts from, at random but always the same, of
            a stream the first ones; null for all.
        backbone: any name that timm.create_model takes, local-dir:FOLDER included.
        pretrained: load the backbone's pretrained weights.
        backbone_kwargs: further arguments of the backbone.
        lora: train low-rank changes of the backbone's weights in place of them, in the stages that
            train it: r, alpha and targets, see timm_fisher/lora.py; {} for its defaults.
        backbone_stage: -1 pools the backbone's output, -2, -3, ... an earlier stage.
        class_token: drop, keep or append it, where the backbone has one.
        last_stride: 1 keeps stride 1 in the last stage of a ResNet, without dilation.
        head: names of installed heads, as in 'avg + sparse_fisher@-2', where @-2 is an earlier
            stage; or a list of heads, each with its name, stage and arguments.
        head_kwargs: arguments of a head that is named; of several, each goes to the only one that
            has it.
        projection: dimensions that pooled vectors are brought to, by PCA and then by stages that
            train the head; null for none.
        whiten: strength of whitening by that PCA, from 0 to 1.
        pre_norm: batch norm without weights before the classifier, as in probes.
        drop_rate: dropout before the classifier.
        img_size: side of the input image; null for the backbone's own.
        crop_pct: share of the resized image that evaluation crops; null for the backbone's own.
        augment: arguments of timm.data.create_transform for training, {} for timm's defaults;
            null for no augmentation.
        stages: by name, in order; if all are unsupervised, no labels are needed, and the model gets
            no classifier.
        batch_size: images per process and step.
        workers: processes that load images; another number draws other augmentations, and another
            order of a stream.
        grad_accum_steps: steps whose gradients are added up.
        mixed_precision: null for what `accelerate launch` says.
        cache: run a frozen backbone once and keep its features; null: if there is no augmentation.
        cache_dir: folder of cached features, shared by runs.
        seed: of everything random.
    """

    output: str = 'runs/train'
    resume: bool = False
    data_dir: str = ''
    dataset: str = ''
    input_key: str | None = None
    target_key: str | None = None
    classes: list[str] = field(default_factory=list)
    train_samples: int | None = None
    train_split: str = 'train'
    val_split: str | None = 'val'
    test_split: str | None = 'test'
    val_fraction: float = 0.15
    test_fraction: float = 0.25
    folds: int = 0
    fold: int = 0
    max_train: int | None = None
    max_test: int | None = None
    max_fit: int | None = None
    backbone: str = 'resnet50'
    pretrained: bool = False
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    backbone_stage: int = -1
    class_token: Literal['drop', 'keep', 'append'] = 'drop'
    last_stride: int | None = None
    head: str | list[dict[str, Any]] = 'avg'
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    projection: int | None = None
    whiten: float = 0.0
    pre_norm: bool = False
    drop_rate: float = 0.0
    img_size: int | None = None
    crop_pct: float | None = None
    augment: dict[str, Any] | None = None
    stages: dict[str, Stage] = field(default_factory=lambda: {'train': Stage()})
    batch_size: int = 64
    workers: int = 2
    grad_accum_steps: int = 1
    mixed_precision: Literal['no', 'fp16', 'bf16'] | None = None
    cache: bool | None = None
    cache_dir: str = 'runs/cache'
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError('stages is empty; give at least one stage.')
        for name, stage in self.stages.items():
            if stage.epochs < 1:
                raise ValueError(f'stages.{name}.epochs is {stage.epochs}; give 1 or more.')
            if stage.unsupervised and stage.train == 'classifier':
                raise ValueError(f'stages.{name} is unsupervised: it cannot train the classifier.')
            if stage.loss and (stage.unsupervised or stage.train == 'classifier'):
                raise ValueError(
                    f'stages.{name}.loss is {stage.loss.get("name")}, which trains no '
                    'classifier: give train: head, all or backbone, and not unsupervised.'
                )
            if stage.loss and (stage.head_loss or stage.label_smoothing):
                raise ValueError(
                    f'stages.{name} has head_loss {stage.head_loss:g} and label_smoothing '
                    f'{stage.label_smoothing:g}: give 0 for both beside a loss of its own.'
                )
            if stage.miner and not stage.loss:
                raise ValueError(f'stages.{name} has a miner, but no loss that takes it.')
            if stage.per_class < 0 or (stage.per_class and self.batch_size % stage.per_class):
                raise ValueError(
                    f'stages.{name}.per_class is {stage.per_class}; give a divisor of batch_size, '
                    f'which is {self.batch_size}.'
                )
            if stage.layers and not stage.trains_backbone:
                raise ValueError(
                    f'stages.{name}.layers is {stage.layers}, but train is {stage.train}: the '
                    'backbone is frozen. Give train: all or backbone.'
                )
        if not 0 <= self.whiten <= 1:
            raise ValueError(f'whiten is {self.whiten:g}; give 0 to 1.')
        if self.whiten and self.projection is None:
            raise ValueError(f'whiten is {self.whiten:g}, but there is no projection. Give both.')
        for name in ('batch_size', 'grad_accum_steps'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; give 1 or more.')
        if self.fold and not self.folds:
            raise ValueError(f'fold is {self.fold}, but folds is 0. Give folds, a number of parts.')
        if self.folds and self.dataset != 'npz':
            raise ValueError(f'folds is {self.folds}: only an .npz file is cut into folds.')
        for name in ('max_train', 'max_test', 'max_fit', 'train_samples'):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f'{name} is {limit}; give 1 or more, or null for all images.')

    @property
    def streamed(self) -> bool:
        """Whether images are read as they come."""
        return self.dataset.startswith(('wds/', 'hfids/'))

    @property
    def of_no_consequence(self) -> tuple[str, ...]:
        """Options that the result of a run does not depend on."""
        depends_on_workers = self.augment is not None or self.streamed
        return ('output', 'resume', 'cache_dir', *(() if depends_on_workers else ('workers',)))

    def caches(self, stage: Stage) -> bool:
        """Whether this stage trains on cached features of its frozen backbone."""
        cache = self.augment is None if self.cache is None else self.cache
        return cache and not stage.trains_backbone and not self.streamed

    @property
    def unsupervised(self) -> bool:
        """Whether no stage reads labels."""
        return all(stage.unsupervised for stage in self.stages.values())

    @property
    def classifies(self) -> bool:
        """Whether some stage trains or uses the classifier."""
        return any(not (stage.unsupervised or stage.loss) for stage in self.stages.values())

    def to_yaml(self) -> str:
        """The configuration as a file that `--config` reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False)
