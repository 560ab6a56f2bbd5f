"""Operators that are refused on purpose, with the reason a user reads."""

from __future__ import annotations

from edgepipe.lowering.converters.registry import refuses

refuses(
    "the size of its result depends on the data",
    *("Compress", "NonMaxSuppression", "NonZero", "Unique"),
)
refuses(
    "bundles are deterministic; draw random numbers outside the model",
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
    "RandomUniformLike",
)
refuses(
    "strings are not tensors of a device",
    *("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer"),
)
refuses(
    "sequences and optionals have no static layout",
    *("ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement"),
    *(
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
    ),
    "SplitToSequence",
)
refuses("its trip count or condition is only known at run time", "If", "Loop", "Scan")
refuses("decode images before the model", "ImageDecoder")
refuses("losses belong to training", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
