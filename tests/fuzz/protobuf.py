"""Damage to protobuf messages along their structure, so that most of them still parse."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field

from tests.fuzz.mutations import FLOATS, INTEGERS, TEXTS, damaged_bytes

_MOST_SITES = 4000
_SIGNED = {Field.TYPE_INT32: 32, Field.TYPE_INT64: 64, Field.TYPE_SINT64: 64}
_UNSIGNED = {Field.TYPE_UINT32: 32, Field.TYPE_UINT64: 64}


def damaged(random: Random, message: Any) -> None:
    """Do one to six things to ``message``, in place."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        sites = list(_sites(message))
        owner, field = random.choice(sites)
        if field.is_repeated:
            _damage_list(random, owner, field, sites)
        elif field.type == Field.TYPE_MESSAGE:
            _damage_message(random, owner, field, sites)
        else:
            setattr(owner, field.name, _scalar(random, field, getattr(owner, field.name), sites))


def _sites(message: Any) -> Iterator[tuple[Any, Any]]:
    """(message, field) of every field that is set, and two that could be per message."""
    queue, count = [message], 0
    while queue and count < _MOST_SITES:
        owner = queue.pop()
        listed = [field for field, _ in owner.ListFields()]
        empty = [f for f in owner.DESCRIPTOR.fields if f not in listed]
        for field in (*listed, *empty[:1], *empty[-1:]):
            count += 1
            yield owner, field
        for field, inner in owner.ListFields():
            if field.type == Field.TYPE_MESSAGE:
                queue += list(inner)[:64] if field.is_repeated else [inner]


def _copy(message: Any) -> Any:
    """A message of its own: protobuf crashes where one is copied into what it contains."""
    return type(message).FromString(message.SerializeToString())


def _damage_list(random: Random, owner: Any, field: Any, sites: list[Any]) -> None:
    items = getattr(owner, field.name)
    message = field.type == Field.TYPE_MESSAGE
    index = random.randrange(len(items)) if len(items) else None
    choice = random.randrange(5)
    if index is None or choice == 0:
        if message:
            items.add()
            donors = [getattr(o, f.name) for o, f in sites if f.message_type == field.message_type
                      and f.is_repeated and len(getattr(o, f.name))]  # fmt: skip
            if donors:
                items[-1].CopyFrom(_copy(random.choice(random.choice(donors))))
        else:
            items.append(_scalar(random, field, None, sites))
    elif choice == 1:
        del items[index]
    elif choice == 2:
        for _ in range(random.choice((1, 1, 3, 40))):
            items.add().CopyFrom(_copy(items[index])) if message else items.append(items[index])
    elif choice == 3 and len(items) > 1:
        kept = [_copy(i) if message else i for i in items]
        random.shuffle(kept)
        del items[:]
        items.extend(kept)
    elif not message:
        items[index] = _scalar(random, field, items[index], sites)
    else:
        del items[:]


def _damage_message(random: Random, owner: Any, field: Any, sites: list[Any]) -> None:
    donors = [getattr(o, f.name) for o, f in sites
              if f.message_type == field.message_type and not f.is_repeated]  # fmt: skip
    if random.random() < 0.5 or not donors:
        owner.ClearField(field.name)
        if random.random() < 0.5:
            getattr(owner, field.name).SetInParent()
    else:
        copied = type(donors[0])()
        copied.CopyFrom(random.choice(donors))
        getattr(owner, field.name).CopyFrom(copied)


def _scalar(random: Random, field: Any, before: Any, sites: list[Any]) -> Any:
    if field.type == Field.TYPE_STRING:
        names = [getattr(o, f.name) for o, f in sites
                 if f.type == Field.TYPE_STRING and not f.is_repeated]  # fmt: skip
        return random.choice(names) if names and random.random() < 0.5 else random.choice(TEXTS)
    if field.type == Field.TYPE_BYTES:
        if random.random() < 0.2:
            return b""
        return damaged_bytes(random, before or random.randbytes(16))
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return random.choice(FLOATS)
    if field.type == Field.TYPE_ENUM:
        return random.choice(field.enum_type.values).number
    if field.type == Field.TYPE_BOOL:
        return random.random() < 0.5
    number = random.choice(INTEGERS)
    if before is not None and random.random() < 0.4:
        number = before + random.choice((-1, 1, 2, -2))
    if field.type in _UNSIGNED:
        return number % 2 ** _UNSIGNED[field.type]
    bits = _SIGNED.get(field.type, 32)
    return max(-(2 ** (bits - 1)), min(number, 2 ** (bits - 1) - 1))
