//! Operations within a captured step: none needs the host, and a replay computes with what is there
//! then.

use engine::selfcheck::{noise, rounded};
use engine::{Activation, DType, Device, EngineError, Ids, Result, Tensor};

const MEMORY: usize = 1 << 26;

/// What fails on a device, given what makes tensors of zeros there.
type Wrong = fn(Device, &dyn Fn(&[usize]) -> Tensor) -> EngineError;

/// What is computed from one tensor `[2,4,6,40]`, row numbers and factors.
type Step = fn(&Tensor, &Ids, &Tensor) -> Result<Vec<Tensor>>;

fn pointwise(x: &Tensor, _: &Ids, factors: &Tensor) -> Result<Vec<Tensor>> {
    let on = x.device().backend();
    let y = on.activation(Activation::Silu, x)?;
    let sum = on.accumulate(on.scale(&y, 0.5)?, x)?;
    let gated = on.geglu(&sum)?;
    let back = on.geglu_backward(&gated, &sum)?;
    let slope = on.activation_backward(Activation::Gelu, on.add(&back, x)?, x)?;
    let rows = slope.reshape(&[48, 40])?;
    let wide = on.cast(&on.scale_rows(&rows, factors)?, DType::F32)?;
    Ok(vec![gated, on.sum_rows(&slope)?, on.sum_rows(&wide)?, on.cast(&wide, x.dtype())?])
}

fn layout(x: &Tensor, ids: &Ids, _: &Tensor) -> Result<Vec<Tensor>> {
    let on = x.device().backend();
    let (first, rest) = on.split_last(x, 12)?;
    let joined = on.concat_last(&rest, &first)?;
    let up = on.upsample2x(&joined)?;
    let down = on.upsample2x_backward(&up)?;
    let chosen = on.embedding(&down.reshape(&[48, 40])?, ids)?;
    Ok(vec![on.concat_rows(&chosen, &down)?, joined, up])
}

fn compose(x: &Tensor, _: &Ids, _: &Tensor) -> Result<Vec<Tensor>> {
    let on = x.device().backend();
    let x = on.cast(x, DType::F32)?;
    let (first, second) = (x.view(1, &[3, 5])?, x.view(40, &[60, 3, 9])?);
    let product = on.kronecker(&first, &second)?;
    let (da, db) = on.kronecker_backward(&product, &first, &second)?;
    let magnitude = x.view(0, &[60, 1])?;
    let (scaled, norms) = on.rescale_rows(&db, &magnitude, 0.7)?;
    let (dv, dm) = on.rescale_rows_backward(&scaled, &db, &norms, &magnitude, 0.7)?;
    Ok(vec![on.multiply(&dv, &db)?, da, dm])
}

#[test]
fn replays_compute_what_single_steps_do() {
    let device = emulator::open(MEMORY).unwrap();
    let card = device.card().unwrap();
    let shape = [2, 4, 6, 40];
    let len = shape.iter().product();
    let ids = Ids::new(device, &[3, 47, 0, 3, 99]).unwrap();
    let factors = Tensor::from_f32(device, &[48], &noise(48, 3), DType::F32).unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (name, step) in
            [("pointwise", pointwise as Step), ("layout", layout), ("compose", compose)]
        {
            let numbers =
                |seed| noise(len, seed).iter().map(|x| rounded(*x, dtype)).collect::<Vec<_>>();
            let x = Tensor::from_f32(device, &shape, &numbers(1), dtype).unwrap();
            let (graph, got) = card.capture(|| step(&x, &ids, &factors)).unwrap();
            for seed in [1, 2] {
                let alone = Tensor::from_f32(device, &shape, &numbers(seed), dtype).unwrap();
                let want = values(&step(&alone, &ids, &factors).unwrap());
                x.refill(&numbers(seed)).unwrap();
                card.driver().replay(graph).unwrap();
                let got = values(&got);
                assert!(got.iter().flatten().all(|x| x.is_finite()), "{name} {dtype:?}");
                assert_eq!(got, want, "{name} {dtype:?}");
            }
            card.driver().drop_graph(graph);
        }
    }
}

fn values(tensors: &[Tensor]) -> Vec<Vec<f32>> {
    tensors.iter().map(|t| t.to_vec_f32().unwrap()).collect()
}

#[test]
fn eight_bits_are_made_and_widened_without_the_host() {
    let device = emulator::open(MEMORY).unwrap();
    let card = device.card().unwrap();
    let x = Tensor::from_f32(device, &[5, 8], &noise(40, 1), DType::F32).unwrap();
    let work = || x.to_dtype(DType::F8)?.to_dtype(DType::BF16);
    let (graph, got) = card.capture(work).unwrap();
    for seed in [1, 2] {
        // Scales are found anew by each replay.
        let numbers: Vec<f32> = noise(40, seed).iter().map(|x| x * seed as f32 * 40.).collect();
        x.refill(&numbers).unwrap();
        card.driver().replay(graph).unwrap();
        let want = Tensor::from_f32(device, &[5, 8], &numbers, DType::F8).unwrap();
        assert_eq!(got.to_vec_f32().unwrap(), want.to_vec_f32().unwrap());
    }
    card.driver().drop_graph(graph);
}

#[test]
fn eight_bits_cannot_be_refilled_or_copied_without_their_scales() {
    let device = emulator::open(MEMORY).unwrap();
    let x = Tensor::from_f32(device, &[5, 8], &noise(40, 1), DType::F8).unwrap();
    let y = Tensor::from_f32(device, &[5, 8], &noise(40, 2), DType::F8).unwrap();
    for wrong in [x.refill(&noise(40, 3)), x.copy_from(&y)] {
        assert!(matches!(wrong, Err(EngineError::DType { .. })), "{wrong:?}");
    }
}

#[test]
fn operands_that_do_not_fit_are_errors_as_on_the_cpu() {
    let card = emulator::open(MEMORY).unwrap();
    let message = |device: Device, run: Wrong| {
        let zeros = |shape: &[usize]| Tensor::zeros(device, shape, DType::F32).unwrap();
        run(device, &zeros).to_string().replace(&device.to_string(), "")
    };
    let wrongs: [Wrong; 9] = [
        |d, t| d.backend().add(&t(&[2, 3]), &t(&[3, 2])).unwrap_err(),
        |d, t| d.backend().geglu(&t(&[2, 3])).unwrap_err(),
        |d, t| d.backend().geglu_backward(&t(&[2, 3]), &t(&[2, 4])).unwrap_err(),
        |d, t| d.backend().sum_rows(&t(&[4])).unwrap_err(),
        |d, t| d.backend().scale_rows(&t(&[4, 2]), &t(&[3])).unwrap_err(),
        |d, t| d.backend().split_last(&t(&[4, 2]), 3).unwrap_err(),
        |d, t| d.backend().upsample2x_backward(&t(&[1, 3, 2, 1])).unwrap_err(),
        |d, t| d.backend().kronecker(&t(&[2, 0]), &t(&[1, 1, 1])).unwrap_err(),
        |d, t| d.backend().rescale_rows(&t(&[2, 3]), &t(&[3]), 1.).unwrap_err(),
    ];
    for wrong in wrongs {
        assert_eq!(message(card, wrong), message(Device::Cpu, wrong));
    }
}
