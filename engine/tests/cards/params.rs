//! Trainable values on a card, changed by what runs on the host.

use engine::{DType, Device, EngineError, ParamId, ParamStore, Tensor};

const MEMORY: usize = 1 << 24;

fn store(device: Device) -> ParamStore {
    let values = |len: usize, from: f32| (0..len).map(|i| from + i as f32 * 0.5).collect();
    let tensors = [(vec![2, 3], values(6, -1.)), (vec![4, 3], values(12, 7.)), (vec![1], vec![3.])];
    ParamStore::new(device, &tensors).unwrap()
}

fn halve(values: &mut [f32]) -> f32 {
    values.iter_mut().enumerate().for_each(|(i, x)| *x = *x * 0.5 - i as f32);
    values.iter().sum()
}

#[test]
fn updates_on_the_host_reach_the_card() {
    let card = emulator::open(MEMORY).unwrap();
    let (mut there, mut here) = (store(card), store(Device::Cpu));
    let before = there.tensor(ParamId(1)).unwrap();
    assert_eq!(there.update(halve).unwrap(), here.update(halve).unwrap());
    let want = here.flat().to_vec_f32().unwrap();
    assert_eq!(there.flat().to_vec_f32().unwrap(), want);
    // In place: what a captured step reads is where it was.
    assert_eq!(before.to_vec_f32().unwrap(), want[6..18]);
    let joined = there.joined(ParamId(0), 2).unwrap();
    assert_eq!((joined.shape(), joined.device()), ([6, 3].as_slice(), card));
    assert_eq!(joined.to_vec_f32().unwrap(), want[..18]);
}

#[test]
fn other_values_have_a_place_of_their_own() {
    let card = emulator::open(MEMORY).unwrap();
    let mut params = store(card);
    let values: Vec<f32> = (0..params.len()).map(|i| i as f32).collect();
    let average = params.with_values(&values).unwrap();
    params.update(halve).unwrap();
    assert_eq!(average.flat().to_vec_f32().unwrap(), values);
    assert_eq!(average.shape(ParamId(1)), [4, 3]);
    assert_ne!(params.flat().to_vec_f32().unwrap(), values);
    assert!(params.with_values(&values[1..]).is_err());
}

#[test]
fn a_captured_step_cannot_be_changed_by_the_host() {
    let card = emulator::open(MEMORY).unwrap();
    let mut params = store(card);
    let before = params.flat().to_vec_f32().unwrap();
    let failed = card.card().unwrap().capture(|| params.update(halve));
    assert!(matches!(failed, Err(EngineError::NotCapturable(_))), "{failed:?}");
    assert_eq!(params.flat().to_vec_f32().unwrap(), before);
}

#[test]
fn a_number_that_is_not_finite_is_seen_on_the_host() {
    let card = emulator::open(MEMORY).unwrap();
    let mut params = store(card);
    params.update(|values| values[7] = f32::NAN).unwrap();
    let bad = |id: usize| {
        let values = params.tensor(ParamId(id)).unwrap().to_vec_f32().unwrap();
        values.iter().any(|x| !x.is_finite())
    };
    assert_eq!([0, 1, 2].map(bad), [false, true, false]);
    let narrow = params.flat().to_dtype(DType::F16).unwrap();
    assert!(narrow.to_vec_f32().unwrap()[7].is_nan());
    let moved: Tensor = params.flat().to_device(Device::Cpu).unwrap();
    assert!(moved.to_vec_f32().unwrap()[7].is_nan());
}
