//! Gradients that are summed in one flat tensor of a card.

use engine::selfcheck::{noise, random, relative_error_of};
use engine::{
    Adapter, Checkpointing, Conv2d, ConvGeometry, DType, Device, Dropouts, ElementLoss, Linear,
    LossSpec, LowRankAdapter, ParamId, ParamStore, Result, Tape, Tensor, Value,
};

const RANK: usize = 3;

fn adapter(first: usize) -> Option<Adapter> {
    Some(Adapter::LowRank(LowRankAdapter {
        down: ParamId(first),
        up: ParamId(first + 1),
        scale: 0.5,
        dropouts: Dropouts::default(),
        module: first as u64,
    }))
}

fn store(device: Device) -> ParamStore {
    let shapes: [&[usize]; 4] = [&[RANK, 8], &[6, RANK], &[RANK, 3, 3, 6], &[4, RANK]];
    let tensors: Vec<_> = shapes
        .iter()
        .enumerate()
        .map(|(seed, shape)| (shape.to_vec(), noise(shape.iter().product(), seed as u32)))
        .collect();
    ParamStore::new(device, &tensors).unwrap()
}

/// A linear layer and a convolution, each with an adapter, and a loss.
fn loss<'m>(tape: &Tape<'m>, device: Device) -> Result<Value> {
    let tensor = |shape: &[usize], seed| random(shape, seed)?.to_device(device);
    let linear = Linear { weight: tensor(&[6, 8], 10)?, bias: None, adapter: adapter(0) };
    let geometry = ConvGeometry::square(3, 1, 1);
    let weight = tensor(&[4, 3, 3, 6], 11)?;
    let conv = Conv2d { weight, bias: None, geometry, adapter: adapter(2) };
    let x = Value::constant(tensor(&[2, 5, 4, 8], 12)?);
    let h = linear.forward(tape, &x)?;
    let y = conv.forward(tape, &h)?;
    let target = tensor(&[2, 5, 4, 4], 13)?;
    tape.loss(&y, &target, &LossSpec::new(device, ElementLoss::L2, &[1.; 2], &[0.5; 2])?)
}

#[test]
fn products_add_to_the_place_of_a_gradient() {
    let params = store(Device::Cpu);
    let tape = Tape::new(&params, Checkpointing::None);
    let mut want = vec![0.; params.len()];
    let from = loss(&tape, Device::Cpu).unwrap();
    tape.backward(&from, &mut |id, gradient| {
        want[params.range(id)].copy_from_slice(&gradient.to_vec_f32()?);
        Ok(())
    })
    .unwrap();

    let card = emulator::open(1 << 24).unwrap();
    let params = store(card);
    // Room behind the gradient, as for the words of the ranks; numbers that are there already.
    let flat = Tensor::from_f32(card, &[want.len() + 5], &vec![1.; want.len() + 5], DType::F32);
    let flat = flat.unwrap();
    let tape = Tape::new(&params, Checkpointing::None);
    let from = loss(&tape, card).unwrap();
    let mut ready = Vec::new();
    tape.backward_onto(&from, &flat, &mut |id, place| {
        assert_eq!(place.shape(), params.shape(id));
        ready.push(id.0);
        Ok(())
    })
    .unwrap();
    assert_eq!(ready, [3, 2, 1, 0]);
    let got = flat.to_vec_f32().unwrap();
    let (sums, behind) = got.split_at(want.len());
    let sums: Vec<f32> = sums.iter().map(|sum| sum - 1.).collect();
    // Subtracting what was there leaves a few units of f32's last place at 1.
    assert!(relative_error_of(&sums, &want) < 1e-5);
    assert_eq!(behind, [1.; 5]);
}
