//! Named tensors and numbers as one safetensors file, exact in both directions.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use formats::safetensors_file::{SafetensorsFile, safetensors_pieces};
use formats::{Dtype, OwnedTensor, TensorFile};

use crate::optimizer::OptimizerState;

/// Begins the names of numbers; no tensor of ours has a colon.
const NUMBER: &str = "number:";

/// The bytes of a file with all of `state`.
pub fn to_bytes(state: &OptimizerState) -> Result<Vec<u8>> {
    let numbers = numbers(state);
    let (head, data) = pieces(state, &numbers)?;
    Ok([&[&head[..]], &data[..]].concat().concat())
}

/// The numbers of a state as tensors of one f64 each.
fn numbers(state: &OptimizerState) -> BTreeMap<String, OwnedTensor> {
    let tensor = |(name, number): (&String, &f64)| {
        let data = number.to_le_bytes().to_vec();
        (format!("{NUMBER}{name}"), OwnedTensor { dtype: Dtype::F64, shape: Vec::new(), data })
    };
    state.numbers.iter().map(tensor).collect()
}

/// The head of the file, and its data where they lie.
fn pieces<'a>(
    state: &'a OptimizerState,
    numbers: &'a BTreeMap<String, OwnedTensor>,
) -> Result<(Vec<u8>, Vec<&'a [u8]>)> {
    let tensors: BTreeMap<String, &OwnedTensor> =
        state.tensors.iter().chain(numbers).map(|(name, tensor)| (name.clone(), tensor)).collect();
    Ok(safetensors_pieces(&tensors)?)
}

/// Reads what [`to_bytes`] wrote; `path` is what errors name.
pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<OptimizerState> {
    let file = SafetensorsFile::from_bytes(path, bytes)?;
    let mut state = OptimizerState::default();
    for name in file.names() {
        let tensor = file.view(name)?.to_owned_tensor();
        match name.strip_prefix(NUMBER) {
            None => {
                state.tensors.insert(name.to_owned(), tensor);
            }
            Some(number) => {
                let value = <[u8; 8]>::try_from(tensor.data.as_slice())
                    .with_context(|| format!("`{name}` is not one number: {}", path.display()))?;
                state.numbers.insert(number.to_owned(), f64::from_le_bytes(value));
            }
        }
    }
    Ok(state)
}

/// f64 values as a tensor.
pub fn f64_tensor(values: &[f64]) -> OwnedTensor {
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    OwnedTensor { dtype: Dtype::F64, shape: vec![values.len()], data }
}

/// The f64 values of a tensor.
pub fn f64_values(name: &str, tensor: &OwnedTensor) -> Result<Vec<f64>> {
    if tensor.dtype != Dtype::F64 {
        bail!("the saved `{name}` must hold F64, it holds: {}", tensor.dtype.safetensors_name());
    }
    let (values, _) = tensor.data.as_chunks::<8>();
    Ok(values.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
}

/// Many files as one message from rank 0, and back.
pub fn pack(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut message = Vec::new();
    for (name, bytes) in files {
        message.extend(title(name, bytes.len()));
        message.extend(bytes);
    }
    message
}

/// What stands before a file in a message.
fn title(name: &str, length: usize) -> Vec<u8> {
    let (name_length, length) = (name.len() as u64, length as u64);
    [&name_length.to_le_bytes()[..], &length.to_le_bytes(), name.as_bytes()].concat()
}

/// Hands `write` the message of [`pack`] with a file `first` and one for each of `states`, in pieces
/// that lie where they are: tensors are not copied.
pub fn pack_in_place<T>(
    first: (&str, &[u8]),
    states: &BTreeMap<&'static str, OptimizerState>,
    write: impl FnOnce(&[&[u8]]) -> T,
) -> Result<T> {
    let numbers: Vec<_> = states.values().map(numbers).collect();
    let mut heads = vec![title(first.0, first.1.len())];
    let mut data = vec![vec![first.1]];
    for ((name, state), numbers) in states.iter().zip(&numbers) {
        let (head, tensors) = pieces(state, numbers)?;
        let length = head.len() + tensors.iter().map(|tensor| tensor.len()).sum::<usize>();
        heads.push([title(&file_name(name), length), head].concat());
        data.push(tensors);
    }
    let all: Vec<&[u8]> = heads
        .iter()
        .zip(&data)
        .flat_map(|(head, data)| std::iter::once(&head[..]).chain(data.iter().copied()))
        .collect();
    Ok(write(&all))
}

/// The file of a part.
pub fn file_name(part: &str) -> String {
    format!("{part}.safetensors")
}

/// Undoes [`pack`].
pub fn unpack(mut message: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut take = |count: usize| {
        let (head, tail) = message.split_at_checked(count).context("a message is cut short")?;
        message = tail;
        anyhow::Ok(head)
    };
    let length = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
    loop {
        let Ok(first) = take(8) else { return Ok(files) };
        let (name, data) = (length(first) as usize, length(take(8)?) as usize);
        let name = String::from_utf8(take(name)?.to_vec())?;
        files.insert(name, take(data)?.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_and_numbers_come_back_to_the_bit() {
        let mut state = OptimizerState::default();
        let odd = [0.1, -0.0, f64::MIN_POSITIVE, f64::INFINITY, 1e300 / 3.];
        for (index, number) in odd.into_iter().enumerate() {
            state.numbers.insert(format!("n/{index}"), number);
        }
        let bytes = OwnedTensor { dtype: Dtype::U8, shape: vec![3], data: vec![1, 2, 255] };
        state.tensors.insert("a/b.c".to_owned(), bytes);
        state.tensors.insert("d".to_owned(), f64_tensor(&odd));
        let written = to_bytes(&state).unwrap();
        let read = from_bytes(Path::new("x"), written.clone()).unwrap();
        assert_eq!(read, state);
        assert_eq!(f64_values("d", &read.tensors["d"]).unwrap(), odd);
        assert!(f64_values("a", &read.tensors["a/b.c"]).is_err());
        assert!(from_bytes(Path::new("x"), written[..50].to_vec()).is_err());
    }

    #[test]
    fn a_message_in_place_is_that_of_the_files() {
        let mut state = OptimizerState::default();
        state.tensors.insert("t".to_owned(), f64_tensor(&[0.5, 2.]));
        state.numbers.insert("n".to_owned(), 3.);
        let states = BTreeMap::from([("a", OptimizerState::default()), ("b", state)]);
        let message = pack_in_place(("facts", b"{}"), &states, |pieces| pieces.concat()).unwrap();
        let mut files = BTreeMap::from([("facts".to_owned(), b"{}".to_vec())]);
        for (name, state) in &states {
            files.insert(file_name(name), to_bytes(state).unwrap());
        }
        assert_eq!(unpack(&message).unwrap(), files);
    }

    #[test]
    fn files_survive_a_message() {
        let files =
            BTreeMap::from([("a".to_owned(), vec![1, 2]), ("empty".to_owned(), Vec::new())]);
        let message = pack(&files);
        assert_eq!(unpack(&message).unwrap(), files);
        assert!(unpack(&message[..message.len() - 1]).is_err());
        assert!(unpack(&[]).unwrap().is_empty());
    }
}
