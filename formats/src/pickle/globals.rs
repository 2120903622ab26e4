//! Which names a pickle may use, and what "calling" them builds. Nothing is imported or executed.

use super::value::{Arena, Global, Id, Storage, Tensor, Value};
use crate::Dtype;

/// Why a name is refused.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Not on the list: it could run code.
    Forbidden,
    /// A storage of numbers that this crate does not know.
    UnknownNumbers,
}

/// Looks a global up in the allow-list.
pub(super) fn resolve(module: &str, name: &str) -> Result<Global, Refusal> {
    let global = match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorWithDtype,
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Global::RebuildParameter
        }
        ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildFromType,
        ("torch", "Size") => Global::Size,
        ("torch" | "torch.storage" | "torch.cuda", _) if name.ends_with("Storage") => {
            return storage_type(name).map(Global::Storage).ok_or(Refusal::UnknownNumbers);
        }
        ("torch", _) if dtype_by_name(name).is_some() => {
            // Just checked to be Some.
            dtype_by_name(name).map_or(Global::Ignored, Global::Dtype)
        }
        ("torch", "device" | "Tensor")
        | ("torch.nn.parameter", "Parameter")
        | ("collections", "defaultdict" | "deque" | "Counter")
        | ("numpy", "dtype" | "ndarray")
        | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar" | "_reconstruct")
        | ("_codecs", "encode")
        | ("copyreg" | "copy_reg", "_reconstructor")
        | ("argparse", "Namespace")
        | ("pathlib", "PosixPath" | "PurePosixPath" | "WindowsPath" | "PureWindowsPath" | "Path")
        | (
            "builtins" | "__builtin__",
            "set" | "frozenset" | "list" | "dict" | "tuple" | "int" | "float" | "str" | "bool"
            | "bytes" | "bytearray" | "complex" | "slice" | "range" | "object",
        ) => Global::Ignored,
        // Training state of PyTorch Lightning; never looked at.
        _ if under(module, "pytorch_lightning") || under(module, "lightning") => Global::Ignored,
        _ if under(module, "omegaconf") => Global::Ignored,
        _ => return Err(Refusal::Forbidden),
    };
    Ok(global)
}

/// True for `package` and its submodules. A dotted *name* could reach an attribute of an import
/// (`sys.modules`), which is harmless here because nothing is looked up.
fn under(module: &str, package: &str) -> bool {
    module.strip_prefix(package).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[expect(clippy::option_option, reason = "outer: known name; inner: typed or untyped")]
fn storage_type(name: &str) -> Option<Option<Dtype>> {
    Some(Some(match name {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        "UntypedStorage" => return Some(None),
        _ => return None,
    }))
}

/// The storage class torch uses for a type; the 8-bit floats have none of their own.
pub(super) fn storage_name(dtype: Dtype) -> Option<&'static str> {
    Some(match dtype {
        Dtype::F64 => "DoubleStorage",
        Dtype::F32 => "FloatStorage",
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
        Dtype::I64 => "LongStorage",
        Dtype::I32 => "IntStorage",
        Dtype::I16 => "ShortStorage",
        Dtype::I8 => "CharStorage",
        Dtype::U8 => "ByteStorage",
        Dtype::Bool => "BoolStorage",
        Dtype::F8E4M3 | Dtype::F8E5M2 => return None,
    })
}

fn dtype_by_name(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" | "double" => Dtype::F64,
        "float32" | "float" => Dtype::F32,
        "float16" | "half" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "int64" | "long" => Dtype::I64,
        "int32" | "int" => Dtype::I32,
        "int16" | "short" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "bool" => Dtype::Bool,
        "float8_e4m3fn" => Dtype::F8E4M3,
        "float8_e5m2" => Dtype::F8E5M2,
        _ => return None,
    })
}

/// What calling `callable` with `args` builds.
pub(super) fn call(arena: &mut Arena, callable: Id, args: Id) -> Result<Id, String> {
    let Value::Global(global) = *arena.get(callable) else {
        // Results of ignored globals may be called in turn; anything else cannot be.
        return match arena.get(callable) {
            Value::Opaque => Ok(Arena::OPAQUE),
            _ => Err("its pickle calls something that is no function".to_owned()),
        };
    };
    let list = match arena.tuple(args) {
        Some(list) => list.to_vec(),
        None if global == Global::Ignored => return Ok(Arena::OPAQUE),
        None => return Err("its pickle calls a function without a tuple of arguments".to_owned()),
    };
    match global {
        Global::OrderedDict => make_dict(arena, &list),
        Global::RebuildTensor => make_tensor(arena, &list, None),
        Global::RebuildTensorWithDtype => {
            let dtype = match list.get(6).map(|id| arena.get(*id)) {
                Some(Value::Global(Global::Dtype(dtype))) => *dtype,
                _ => return Err("its pickle rebuilds a tensor without a type".to_owned()),
            };
            make_tensor(arena, &list, Some(dtype))
        }
        Global::RebuildParameter | Global::Size => {
            list.first().copied().ok_or_else(|| "its pickle rebuilds nothing".to_owned())
        }
        // (function, type, arguments, state): the type and the attributes do not matter here.
        Global::RebuildFromType => match list[..] {
            [inner, _, inner_args, ..]
                if !matches!(arena.get(inner), Value::Global(Global::RebuildFromType)) =>
            {
                call(arena, inner, inner_args)
            }
            _ => Err("its pickle rebuilds a tensor in an unknown way".to_owned()),
        },
        Global::Storage(_) | Global::Dtype(_) => {
            Err("its pickle calls a storage class, which torch never writes".to_owned())
        }
        Global::Ignored => Ok(Arena::OPAQUE),
    }
}

/// `OrderedDict()` or `OrderedDict([(key, value), ...])`.
fn make_dict(arena: &mut Arena, args: &[Id]) -> Result<Id, String> {
    let mut items = Vec::new();
    if let Some(Value::List(pairs)) = args.first().map(|id| arena.get(*id)) {
        for pair in pairs {
            match arena.get(*pair) {
                Value::Tuple(pair) | Value::List(pair) if pair.len() == 2 => {
                    items.push((pair[0], pair[1]));
                }
                _ => return Err("its pickle makes a dictionary of something else".to_owned()),
            }
        }
    }
    arena.add(Value::Dict(items))
}

/// (storage, offset, size, stride, ...) as in torch's `_rebuild_tensor_v2`.
fn make_tensor(arena: &mut Arena, args: &[Id], dtype: Option<Dtype>) -> Result<Id, String> {
    let parts = match args {
        [storage, offset, size, stride, ..] => {
            let Value::Storage(Storage { dtype: own, .. }) = arena.get(*storage) else {
                return Err("its pickle rebuilds a tensor from something else".to_owned());
            };
            let dtype = dtype.or(*own);
            let sizes = arena.sizes(*size).zip(arena.sizes(*stride));
            dtype.zip(arena.int(*offset)).zip(sizes).map(|parts| (*storage, parts))
        }
        _ => None,
    };
    let Some((storage, ((dtype, offset), (shape, strides)))) = parts else {
        return Err("its pickle rebuilds a tensor from impossible numbers".to_owned());
    };
    if shape.len() != strides.len() || shape.len() > 32 {
        return Err("its pickle rebuilds a tensor whose strides do not fit its shape".to_owned());
    }
    arena.add(Value::Tensor(Tensor { storage, dtype, offset, shape, strides }))
}

/// The value of a persistent id: `('storage', type, key, location, elements)`.
pub(super) fn make_storage(arena: &mut Arena, id: Id) -> Result<Id, String> {
    let storage = match arena.tuple(id) {
        Some([tag, class, key, _location, elements]) if arena.text(*tag) == Some("storage") => {
            match (arena.get(*class), arena.text(*key), arena.int(*elements)) {
                (Value::Global(Global::Storage(dtype)), Some(key), Some(elements)) => {
                    Some(Storage { key: key.to_owned(), dtype: *dtype, elements })
                }
                _ => None,
            }
        }
        _ => None,
    };
    let storage = storage.ok_or("its pickle refers to a storage in an unknown way")?;
    arena.add(Value::Storage(storage))
}
