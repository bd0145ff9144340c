"""A data set of one's own: rows from anywhere as `Pair`s; colours and their names."""

from PIL import Image

from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Item, Pair
from cocoa_pl.data.sources import as_subsets, distinct_texts


class Colours:
    """Every data source has these six members; training needs no more."""

    left_out = ()  # errors of rows that were read and are not used; `cocoa doctor` lists them
    caption_subsets = ("colours",)  # a picture and its whole caption, for the generative stages

    def __init__(self, *, side: int) -> None:
        names = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]
        self.pairs = [
            Pair(
                query=Item(IMAGE_SLOT, (Image.new("RGB", (side, side), name),)),
                positive=Item(f"a {name} square"),
                negatives=(),
                subset="colours",
                row_id=f"colours {name}",
            )
            for name in names
        ]

    def train_pairs(self) -> list[Pair]:
        return self.pairs

    def validation_pairs(self) -> list[Pair]:
        return self.pairs[:4]

    def validation_subsets(self) -> list[EvalSubset]:
        return as_subsets(self.validation_pairs(), max_rows=4)

    def training_texts(self) -> list[str]:
        return distinct_texts(self.pairs)
