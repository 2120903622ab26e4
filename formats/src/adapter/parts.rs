//! Keys sorted into modules, and the sizes of a module's tensors checked against each other.

use std::collections::BTreeMap;

use super::names::{self, Part, Role};
use super::{AdapterKind, AdapterModule, KronFactor, Naming};
use crate::FormatError;
use crate::tensor_file::TensorFile;

/// A module before its family is known.
pub(super) struct Found {
    pub part: Part,
    pub layer: String,
    pub naming: Naming,
    /// Its name is still empty.
    pub module: AdapterModule,
}

pub(super) struct Grouped {
    pub modules: Vec<Found>,
    pub unknown: Vec<String>,
}

/// A key and why it cannot be.
type Fault = (String, String);

/// Tensors of one module: role -> key.
#[derive(Default)]
struct Pieces<'f> {
    stored: &'f str,
    naming: Option<Naming>,
    keys: BTreeMap<Role, &'f str>,
}

/// Sorts the keys of `file`.
pub(super) fn group(file: &dyn TensorFile) -> Result<Grouped, FormatError> {
    let bad = |(key, reason): Fault| FormatError::BadLora {
        path: file.path().to_path_buf(),
        reason,
        key,
    };
    let mut pieces: BTreeMap<(Part, String), Pieces<'_>> = BTreeMap::new();
    let mut unknown = Vec::new();
    for key in file.names() {
        let Some(parsed) = names::parse(key) else {
            unknown.push(key.to_owned());
            continue;
        };
        let module = pieces.entry((parsed.part, parsed.layer)).or_default();
        if let Some(other) = module.keys.insert(parsed.role, key) {
            let reason = format!("two keys stand for one tensor, `{other}` and this");
            return Err(bad((key.to_owned(), reason)));
        }
        // An alpha may lack what the names of the weights have.
        if module.naming.is_none() || parsed.role == Role::Down {
            module.stored = parsed.stored;
            module.naming = Some(parsed.naming);
        }
    }
    let mut modules = Vec::new();
    for ((part, layer), pieces) in pieces {
        if pieces.keys.keys().all(|role| *role == Role::Alpha)
            && let Some(alpha) = pieces.keys.get(&Role::Alpha)
            && unknown.iter().any(|key| key.starts_with(&format!("{}.", pieces.stored)))
        {
            // The alpha of a kind that is not known here.
            unknown.push((*alpha).to_owned());
            continue;
        }
        let module = build(file, &pieces).map_err(bad)?;
        let naming = pieces.naming.unwrap_or(Naming::Kohya);
        modules.push(Found { part, layer, naming, module });
    }
    unknown.sort();
    if modules.is_empty() {
        return Err(bad(match unknown.first() {
            Some(key) => (key.clone(), names::describe_stranger(key).to_owned()),
            None => (String::new(), "it holds no tensors".to_owned()),
        }));
    }
    Ok(Grouped { modules, unknown })
}

fn build(file: &dyn TensorFile, pieces: &Pieces<'_>) -> Result<AdapterModule, Fault> {
    for (role, key) in &pieces.keys {
        let Some((dtype, shape)) = file.describe(key) else { continue };
        if *role == Role::Alpha {
            continue;
        }
        if !dtype.is_float() {
            return Err(fault(key, format!("this key holds {dtype} numbers")));
        }
        if shape.contains(&0) {
            return Err(fault(key, format!("this key has the shape {shape:?}")));
        }
    }
    let owned = |role: Role| pieces.keys.get(&role).map(|key| (*key).to_owned());
    let mut bias = owned(Role::DiffB);
    let kind = kind_of(file, pieces, &mut bias)?;
    let alpha = owned(Role::Alpha).map(|key| read_alpha(file, &key)).transpose()?;
    let has_rank = rank(&kind, |key| file.shape(key).unwrap_or_default()) > 0;
    Ok(AdapterModule {
        name: String::new(),
        stored: pieces.stored.to_owned(),
        kind,
        // LyCORIS stores an alpha for a LoKr of two whole factors too, and does not scale by it.
        alpha: alpha.filter(|_| has_rank),
        dora_scale: owned(Role::DoraScale),
        bias,
    })
}

fn read_alpha(file: &dyn TensorFile, key: &str) -> Result<f32, Fault> {
    let view = file.view(key).map_err(|error| fault(key, error.to_string()))?;
    match view.to_f32()[..] {
        [value] if value.is_finite() => Ok(value),
        [value] => Err(fault(key, format!("this key holds {value}"))),
        ref values => {
            Err(fault(key, format!("this key should hold one number, not {}", values.len())))
        }
    }
}

fn fault(key: &str, reason: impl Into<String>) -> Fault {
    (key.to_owned(), reason.into())
}

/// The kind that the roles at hand make; `bias` is taken when it is all there is.
fn kind_of(
    file: &dyn TensorFile,
    pieces: &Pieces<'_>,
    bias: &mut Option<String>,
) -> Result<AdapterKind, Fault> {
    let has = |roles: &[Role]| roles.iter().any(|role| pieces.keys.contains_key(role));
    let get = |role: Role| pieces.keys.get(&role).map(|key| (*key).to_owned());
    let low = [Role::Down, Role::Up, Role::Mid];
    let hada =
        [Role::HadaW1A, Role::HadaW1B, Role::HadaW2A, Role::HadaW2B, Role::HadaT1, Role::HadaT2];
    let kron = [
        Role::LokrW1,
        Role::LokrW1A,
        Role::LokrW1B,
        Role::LokrW2,
        Role::LokrW2A,
        Role::LokrW2B,
        Role::LokrT2,
    ];
    let norm = [Role::NormW, Role::NormB];
    let kinds: [&[Role]; 5] = [&low, &hada, &kron, &[Role::Diff], &norm];
    let present: Vec<&&[Role]> = kinds.iter().filter(|roles| has(roles)).collect();
    if let [_, second, ..] = present[..]
        && let Some(key) = second.iter().find_map(|role| get(*role))
    {
        return Err((key, "its module is of two kinds, this key is of the second".to_owned()));
    }
    // A key of the module, for what is missing.
    let any = pieces.keys.values().next().copied().unwrap_or_default();
    let need = |role: Role, what: &str| {
        get(role).ok_or_else(|| {
            let beside = present.first().and_then(|roles| roles.iter().find_map(|role| get(*role)));
            let beside = beside.unwrap_or_else(|| any.to_owned());
            (beside, format!("this key lacks its `{what}`"))
        })
    };
    let shape = |key: &str| file.shape(key).unwrap_or_default();
    if has(&low) {
        let (down, up) = (need(Role::Down, "lora_down")?, need(Role::Up, "lora_up")?);
        let mid = get(Role::Mid);
        check_low_rank(shape, &down, &up, mid.as_deref())?;
        Ok(AdapterKind::LowRank { down, up, mid })
    } else if has(&hada) {
        let kind = AdapterKind::Hadamard {
            w1_a: need(Role::HadaW1A, "hada_w1_a")?,
            w1_b: need(Role::HadaW1B, "hada_w1_b")?,
            w2_a: need(Role::HadaW2A, "hada_w2_a")?,
            w2_b: need(Role::HadaW2B, "hada_w2_b")?,
            t1: get(Role::HadaT1),
            t2: get(Role::HadaT2),
        };
        check_hadamard(shape, &kind)?;
        Ok(kind)
    } else if has(&kron) {
        let factor = |whole: Role, a: Role, b: Role, name: &str| match (get(whole), get(a), get(b))
        {
            (Some(whole), None, None) => Ok(KronFactor::Whole(whole)),
            (None, Some(a), Some(b)) => Ok(KronFactor::Product(a, b)),
            (None, Some(a), None) => Err((a, format!("this key lacks its `{name}_b`"))),
            (None, None, Some(b)) => Err((b, format!("this key lacks its `{name}_a`"))),
            (Some(whole), ..) => {
                Err((whole, format!("`{name}` is there whole and as a product, this key is whole")))
            }
            (None, None, None) => need(whole, name).map(KronFactor::Whole),
        };
        let kind = AdapterKind::Kronecker {
            w1: factor(Role::LokrW1, Role::LokrW1A, Role::LokrW1B, "lokr_w1")?,
            w2: factor(Role::LokrW2, Role::LokrW2A, Role::LokrW2B, "lokr_w2")?,
            t2: get(Role::LokrT2),
        };
        check_kronecker(shape, &kind)?;
        Ok(kind)
    } else if let Some(diff) = get(Role::Diff) {
        check_dims(shape, &diff, &[1, 2, 4])?;
        Ok(AdapterKind::Full { diff })
    } else if has(&norm) {
        Ok(AdapterKind::Norm { w_norm: get(Role::NormW), b_norm: get(Role::NormB) })
    } else if bias.is_some() {
        Ok(AdapterKind::Norm { w_norm: None, b_norm: bias.take() })
    } else {
        Err(fault(any, "this key belongs to no weights"))
    }
}

fn check_dims<'f>(
    shape: impl Fn(&str) -> &'f [usize],
    key: &str,
    dims: &[usize],
) -> Result<(), Fault> {
    let got = shape(key);
    if dims.contains(&got.len()) {
        return Ok(());
    }
    Err(fault(key, format!("this key has the shape {got:?}")))
}

/// Dimension `at` of `key` must be the rank.
fn check_rank<'f>(
    shape: impl Fn(&str) -> &'f [usize],
    key: &str,
    at: usize,
    rank: usize,
) -> Result<(), Fault> {
    match shape(key).get(at) {
        Some(size) if *size == rank => Ok(()),
        size => {
            let size = size.copied().unwrap_or_default();
            Err(fault(
                key,
                format!("its module has different ranks, {rank} and, of this key, {size}"),
            ))
        }
    }
}

fn check_one_by_one<'f>(shape: impl Fn(&str) -> &'f [usize], key: &str) -> Result<(), Fault> {
    let got = shape(key);
    if got.get(2..).unwrap_or_default().iter().all(|size| *size == 1) {
        return Ok(());
    }
    Err(fault(key, format!("this key should be a 1x1 kernel, it is {got:?}")))
}

fn check_low_rank<'f>(
    shape: impl Fn(&str) -> &'f [usize],
    down: &str,
    up: &str,
    mid: Option<&str>,
) -> Result<(), Fault> {
    check_dims(&shape, down, &[2, 4])?;
    check_dims(&shape, up, &[2, 4])?;
    check_one_by_one(&shape, up)?;
    let rank = shape(down)[0];
    if let Some(mid) = mid {
        check_dims(&shape, mid, &[4])?;
        check_one_by_one(&shape, down)?;
        check_rank(&shape, mid, 1, rank)?;
        return check_rank(&shape, up, 1, shape(mid)[0]);
    }
    check_rank(&shape, up, 1, rank)?;
    if shape(up).len() != shape(down).len() {
        return Err(fault(up, "this key and its other half differ in dimensions"));
    }
    Ok(())
}

fn check_hadamard<'f>(
    shape: impl Fn(&str) -> &'f [usize],
    kind: &AdapterKind,
) -> Result<(), Fault> {
    let AdapterKind::Hadamard { w1_a, w1_b, w2_a, w2_b, t1, t2 } = kind else { return Ok(()) };
    for key in [w1_a, w1_b, w2_a, w2_b] {
        check_dims(&shape, key, &[2])?;
    }
    let core = match (t1, t2) {
        (None, None) => false,
        (Some(_), Some(_)) => true,
        (Some(t), None) => return Err(fault(t, "this key lacks its `hada_t2`")),
        (None, Some(t)) => return Err(fault(t, "this key lacks its `hada_t1`")),
    };
    for (a, b, t) in [(w1_a, w1_b, t1), (w2_a, w2_b, t2)] {
        let rank = shape(b)[0];
        check_rank(&shape, a, usize::from(!core), rank)?;
        if let Some(t) = t {
            check_dims(&shape, t, &[4])?;
            check_rank(&shape, t, 0, rank)?;
            check_rank(&shape, t, 1, rank)?;
        }
    }
    let out = usize::from(core);
    let kernel = |t: &Option<String>| t.as_ref().map(|t| shape(t)[2..].to_vec());
    if shape(w1_a)[out] != shape(w2_a)[out]
        || shape(w1_b)[1] != shape(w2_b)[1]
        || kernel(t1) != kernel(t2)
    {
        return Err(fault(
            w2_a,
            "the factors of its module differ in size, this key is of the second",
        ));
    }
    Ok(())
}

fn check_kronecker<'f>(
    shape: impl Fn(&str) -> &'f [usize],
    kind: &AdapterKind,
) -> Result<(), Fault> {
    let AdapterKind::Kronecker { w1, w2, t2 } = kind else { return Ok(()) };
    match w1 {
        KronFactor::Whole(key) => check_dims(&shape, key, &[2])?,
        KronFactor::Product(a, b) => {
            check_dims(&shape, a, &[2])?;
            check_dims(&shape, b, &[2])?;
            check_rank(&shape, b, 0, shape(a)[1])?;
        }
    }
    match (w2, t2) {
        (KronFactor::Whole(_), Some(t)) => {
            Err(fault(t, "this key is the core of a product, but `lokr_w2` is whole"))
        }
        (KronFactor::Whole(key), None) => check_dims(&shape, key, &[2, 4]),
        (KronFactor::Product(a, b), core) => {
            check_dims(&shape, a, &[2])?;
            check_dims(&shape, b, &[2])?;
            let rank = shape(b)[0];
            check_rank(&shape, a, usize::from(core.is_none()), rank)?;
            let Some(t) = core else { return Ok(()) };
            check_dims(&shape, t, &[4])?;
            check_rank(&shape, t, 0, rank)?;
            check_rank(&shape, t, 1, rank)
        }
    }
}

/// The rank, 0 for kinds without one. `shape` gives the shape of a key.
pub(super) fn rank<'f>(kind: &AdapterKind, shape: impl Fn(&str) -> &'f [usize]) -> usize {
    let first = |key: &str| shape(key).first().copied().unwrap_or_default();
    match kind {
        AdapterKind::LowRank { down, .. } => first(down),
        AdapterKind::Hadamard { w1_b, .. } => first(w1_b),
        AdapterKind::Kronecker { w1: KronFactor::Product(_, b), .. }
        | AdapterKind::Kronecker { w2: KronFactor::Product(_, b), .. } => first(b),
        AdapterKind::Kronecker { .. } | AdapterKind::Full { .. } | AdapterKind::Norm { .. } => 0,
    }
}

/// The shape of the layer's weight as far as the tensors tell.
pub(super) fn layer_shape<'f>(
    kind: &AdapterKind,
    shape: impl Fn(&str) -> &'f [usize],
) -> Vec<usize> {
    let window = |key: &str| shape(key).get(2..).unwrap_or_default();
    let size = |key: &str, at: usize| shape(key).get(at).copied().unwrap_or_default();
    let joined =
        |out: usize, columns: usize, window: &[usize]| [&[out, columns][..], window].concat();
    match kind {
        AdapterKind::LowRank { down, up, mid } => {
            joined(size(up, 0), size(down, 1), window(mid.as_ref().unwrap_or(down)))
        }
        AdapterKind::Hadamard { w1_a, w1_b, t1: Some(core), .. } => {
            joined(size(w1_a, 1), size(w1_b, 1), window(core))
        }
        AdapterKind::Hadamard { w1_a, w1_b, .. } => joined(size(w1_a, 0), size(w1_b, 1), &[]),
        AdapterKind::Kronecker { w1, w2, t2 } => {
            let (rows, columns) = match w1 {
                KronFactor::Whole(key) => (size(key, 0), size(key, 1)),
                KronFactor::Product(a, b) => (size(a, 0), size(b, 1)),
            };
            let (inner_rows, inner_columns, window) = match (w2, t2) {
                (KronFactor::Whole(key), _) => (size(key, 0), size(key, 1), window(key)),
                (KronFactor::Product(a, b), Some(core)) => (size(a, 1), size(b, 1), window(core)),
                (KronFactor::Product(a, b), None) => (size(a, 0), size(b, 1), &[][..]),
            };
            let (out, columns) =
                (rows.saturating_mul(inner_rows), columns.saturating_mul(inner_columns));
            joined(out, columns, window)
        }
        AdapterKind::Full { diff } => shape(diff).to_vec(),
        AdapterKind::Norm { w_norm, b_norm } => {
            let key = w_norm.as_ref().or(b_norm.as_ref());
            key.map(|key| shape(key).to_vec()).unwrap_or_default()
        }
    }
}

/// The keys of a kind.
pub(super) fn kind_keys(kind: &AdapterKind) -> Vec<&str> {
    fn factor(factor: &KronFactor) -> Vec<&str> {
        match factor {
            KronFactor::Whole(key) => vec![key],
            KronFactor::Product(a, b) => vec![a, b],
        }
    }
    match kind {
        AdapterKind::LowRank { down, up, mid } => {
            [down, up].into_iter().chain(mid).map(String::as_str).collect()
        }
        AdapterKind::Hadamard { w1_a, w1_b, w2_a, w2_b, t1, t2 } => {
            let pairs = [w1_a, w1_b, w2_a, w2_b];
            pairs.into_iter().chain(t1).chain(t2).map(String::as_str).collect()
        }
        AdapterKind::Kronecker { w1, w2, t2 } => {
            [factor(w1), factor(w2), t2.as_deref().into_iter().collect()].concat()
        }
        AdapterKind::Full { diff } => vec![diff],
        AdapterKind::Norm { w_norm, b_norm } => {
            w_norm.iter().chain(b_norm).map(String::as_str).collect()
        }
    }
}
