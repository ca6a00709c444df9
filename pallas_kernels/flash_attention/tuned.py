"""Configs that `python -m pallas_kernels.tune --save` found on this machine, for calls that ask for them."""

import dataclasses
import datetime
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import checks
from pallas_kernels.device import device_name
from pallas_kernels.flash_attention.arguments import make_spec, shapes_of
from pallas_kernels.flash_attention.config import FlashConfig

logger = logging.getLogger("pallas_kernels")


def tuned_config(
    query: Any,
    key: Any,
    value: Any = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    deterministic: bool = False,
) -> FlashConfig | None:
    """Looks up the config saved on this machine for calls like this one; None where there is none.

        config = tuned_config(query, key, value, is_causal=True)
        out = flash_attention(query, key, value, is_causal=True, config=config)

    None makes flash_attention take its own default, so a program is right with and without a cache. Nothing
    is measured here, and flash_attention never looks for itself: what a program computes does not depend on
    files it does not name.

    Arguments: as flash_attention; of the arrays only shapes and dtypes are read (ShapeDtypeStruct will do).
    A config serves calls on the same kind of device and version of JAX, with the same head dims, dtype, mask
    kind and heads per KV head, and with lengths and batch x heads in the same power of two.
    """
    inputs = shapes_of(query, key, value)
    options: Any = {
        "is_causal": is_causal,
        "local_window_size": local_window_size,
        "logits_soft_cap": logits_soft_cap,
        "deterministic": deterministic,
    }
    make_spec(inputs.query, **options)
    name = shape_class(inputs.query, inputs.key, inputs.value, **options)
    entry = _read(cache_path()).get(device_name(), {}).get(jax.__version__, {}).get(name)
    try:
        return None if entry is None else config_from_dict(entry["config"])
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("%s: the config for %r is not one of this version: %s", cache_path(), name, error)
        return None


def save_config(name: str, config: FlashConfig, figures: dict[str, float]) -> Path:
    """Keeps a config for a shape class on this kind of device and this version of JAX; returns the file."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read(path)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"config": dataclasses.asdict(config), **figures, "date": date}
    entries.setdefault(device_name(), {}).setdefault(jax.__version__, {})[name] = entry
    # Readers see the old file or the new one, never half of it.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(entries, indent=1) + "\n")
    os.replace(file.name, path)
    return path


def cache_path() -> Path:
    """$XDG_CACHE_HOME/jaxattn/flash_configs.json, in ~/.cache where that is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "jaxattn" / "flash_configs.json"


def shape_class(
    query: Any,
    key: Any,
    value: Any,
    *,
    is_causal: bool,
    local_window_size: int | tuple[int | None, int | None] | None,
    logits_soft_cap: float | None,
    deterministic: bool,
) -> str:
    """What calls must share to share a config."""
    batch, num_queries, num_heads, head_dim = query.shape
    left, right = checks.normalize_window(local_window_size)
    words = [
        f"H={head_dim}" + ("" if value.shape[3] == head_dim else f"/{value.shape[3]}"),
        jax.numpy.dtype(query.dtype).name,
        f"T<={_power_above(num_queries)}",
        f"S<={_power_above(key.shape[1])}",
        f"BN<={_power_above(batch * num_heads)}",
        f"G={num_heads // key.shape[2]}",
        "causal" if is_causal else "full",
    ]
    if (left, right) != (None, None):
        reach = [side if side is None else _power_above(side) for side in (left, right)]
        words.append(f"window<=({reach[0]},{reach[1]})")
    words += ["soft cap"] if logits_soft_cap is not None else []
    words += ["deterministic"] if deterministic else []
    return " ".join(words)


def _power_above(size: int) -> int:
    """The smallest power of two >= size."""
    return 1 << max(0, size - 1).bit_length()


def config_from_dict(fields: dict[str, Any], kind: type = FlashConfig) -> Any:
    """A config, and the configs in it, from what dataclasses.asdict made of it; validates itself."""
    defaults = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(defaults)):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(defaults)}")
    values = {
        name: config_from_dict(field, nested) if (nested := _nested(defaults[name])) and field else field
        for name, field in fields.items()
    }
    return kind(**values)


def _nested(field: dataclasses.Field) -> Any:
    """The config class of a field such as `dq: GradientConfig` or `fused: FusedConfig | None`."""
    options = getattr(field.type, "__args__", (field.type,))
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it or mend it") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(entries).__name__}: delete it")
    return entries
