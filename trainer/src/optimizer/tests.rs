//! Every optimizer against the trajectory of its reference implementation, its saved state, and
//! what all must keep to. The data is made by `tests/data/reference_scripts/make_optimizers.py`.

use engine::{Device, ParamId, ParamStore};
use formats::open_tensor_file;
use serde_json::Value;

use super::blockwise::{Code, Signs};
use super::registry::{choose, names};
use super::{Build, Choice, Optimize, StepInput, TensorForm, TensorStep};

/// The shapes of the reference, as in files.
const SHAPES: [&[usize]; 6] = [&[4, 8], &[8, 4], &[16], &[4, 3, 3, 5], &[72, 64], &[4, 3, 1, 1]];
const FIRST_GROUP: usize = 2;
/// Every so many numbers of a large tensor are in the data.
const STRIDE: usize = 37;

fn data_path(name: &str) -> std::path::PathBuf {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/optimizers");
    std::path::Path::new(path).join(name)
}

/// The generator of the reference's script.
struct Draw(u32);

impl Draw {
    fn take(&mut self, count: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.0 >> 8) as f32 / 8_388_608. - 1.
        };
        (0..count).map(|_| next()).collect()
    }
}

fn forms() -> Vec<TensorForm> {
    let form = |(index, shape): (usize, &&[usize])| TensorForm {
        name: format!("tensor{index}"),
        file_shape: shape.to_vec(),
    };
    SHAPES.iter().enumerate().map(form).collect()
}

/// `[O,I,h,w]` to `[O,h,w,I]` or back (`to_file`), as the engine and files differ.
fn reorder(form: &TensorForm, values: &[f32], to_file: bool) -> Vec<f32> {
    let (channels, pixels) = form.kernel();
    let (rows, columns) = if to_file { (pixels, channels) } else { (channels, pixels) };
    let matrices = values.chunks_exact(rows * columns);
    let swap = |matrix: &[f32]| -> Vec<f32> {
        (0..columns)
            .flat_map(|c| (0..rows).map(move |r| (r, c)))
            .map(|(r, c)| matrix[r * columns + c])
            .collect()
    };
    matrices.flat_map(swap).collect()
}

fn initial() -> ParamStore {
    let mut draw = Draw(1);
    let tensors: Vec<_> = forms()
        .iter()
        .map(|form| {
            let values: Vec<f32> = draw.take(form.len()).iter().map(|x| x * 0.5).collect();
            let mut shape = form.file_shape.clone();
            if let [_, _, _, _] = shape[..] {
                shape[1..].rotate_left(1);
            }
            (shape, reorder(form, &values, false))
        })
        .collect();
    ParamStore::new(Device::Cpu, &tensors).unwrap()
}

/// The flat gradient of a step, from 0.
fn gradient(step: usize) -> Vec<f32> {
    let (mut draw, mut direction) = (Draw(1000 + step as u32), Draw(7));
    let sizes = [1., 0.25, 2., 0.5, 0.125, 1_f32];
    let mut flat = Vec::new();
    for (form, size) in forms().iter().zip(sizes) {
        let size = size * (1 + step % 3) as f32;
        let noise = draw.take(form.len());
        let values = noise.iter().zip(direction.take(form.len())).enumerate();
        let values: Vec<f32> = values
            .map(|(index, (x, direction))| {
                let value = x * 0.5 + direction;
                (if index % 7 == 0 { value * 0.007_812_5 } else { value }) * size
            })
            .collect();
        flat.extend(reorder(form, &values, false));
    }
    flat
}

/// The tensors of a step; the second has no gradient in two of them.
fn tensors(params: &ParamStore, step: usize, rates: (f64, f64)) -> Vec<TensorStep> {
    let ids = (0..params.count()).filter(|id| *id != 1 || ![4, 12].contains(&step));
    ids.map(|id| {
        let lr = if id < FIRST_GROUP { rates.0 } else { rates.1 };
        TensorStep { id: ParamId(id), range: params.range(ParamId(id)), lr: lr as f32 }
    })
    .collect()
}

/// A run of one optimizer.
struct Run {
    optimizer: Box<dyn Optimize>,
    params: ParamStore,
    rates: (f64, f64),
    warmup: bool,
}

impl Run {
    fn new(choice: &Choice, rates: (f64, f64), warmup: bool) -> Self {
        let params = initial();
        let forms = forms();
        let build = Build { params: &params, forms: &forms, learning_rate: rates.0 };
        let optimizer = choice.recipe.build(&build).unwrap();
        Self { optimizer, params, rates, warmup }
    }

    fn step(&mut self, step: usize) {
        let factor = match self.warmup {
            true => (step as f64 / 4.).min(1.) * (1. - step as f64 / 40.),
            false => 1.,
        };
        let rates = (self.rates.0 * factor, self.rates.1 * factor);
        let (gradient, tensors) = (gradient(step), tensors(&self.params, step, rates));
        let input = StepInput { gradient: &gradient, tensors: &tensors, schedule_factor: factor };
        self.optimizer.step(&mut self.params, &input).unwrap();
    }

    fn weights(&self) -> Vec<f32> {
        self.params.flat().to_vec_f32().unwrap()
    }
}

/// What the data keeps of flat weights, in the order of files.
fn sample(params: &ParamStore, flat: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for (index, form) in forms().iter().enumerate() {
        let values = reorder(form, &flat[params.range(ParamId(index))], true);
        let stride = if values.len() > 4096 { STRIDE } else { 1 };
        out.extend(values.iter().step_by(stride));
    }
    out
}

fn records() -> Vec<Value> {
    let text = std::fs::read_to_string(data_path("trajectories.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn choice_of(record: &Value) -> Choice {
    let name = record["name"].as_str().unwrap();
    let class = record["class"].as_str().unwrap();
    // Two packages have CAME under one name.
    let name = if class.starts_with("came_pytorch") { "came_pytorch.CAME" } else { name };
    let pair = |item: &Value| {
        let (key, value) = item.as_str().unwrap().split_once('=').unwrap();
        (key.to_owned(), value.to_owned())
    };
    let arguments: Vec<_> = record["args"].as_array().unwrap().iter().map(pair).collect();
    let choice = choose(name, &arguments).unwrap();
    assert_eq!(choice.class, class);
    choice
}

fn run_of(record: &Value) -> Run {
    let lr = record["lr"].as_f64().unwrap();
    let rates = (lr, lr * record["second_group"].as_f64().unwrap());
    Run::new(&choice_of(record), rates, record["schedule"] == "warmup")
}

/// Largest difference of two trajectories by what rounding explains: the sums of the references are
/// in f32, which moves an estimate `d` and with it the whole way by 1e-5 and less; and twenty steps
/// round weights of about 0.5 a few times each, by 3e-8.
fn difference(got: &[f32], want: &[f32], start: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = |pairs: &mut dyn Iterator<Item = (&f32, &f32)>| {
        pairs.map(|(a, b)| (a - b).abs()).fold(0_f32, f32::max)
    };
    let way = largest(&mut want.iter().zip(start));
    assert!(way > 0.);
    largest(&mut got.iter().zip(want)) / (3e-5 * way + 2. * f32::EPSILON)
}

#[test]
fn trajectories_are_those_of_the_references() {
    let file = open_tensor_file(&data_path("trajectories.safetensors")).unwrap();
    let mut worst: Vec<(f32, String)> = Vec::new();
    for (index, record) in records().iter().enumerate() {
        let mut run = run_of(record);
        let start = sample(&run.params, &run.weights());
        for step in 0..20 {
            run.step(step);
            if let Some(d) = record["d"].get(step).and_then(Value::as_f64) {
                let ours = run.optimizer.effective_scale().unwrap();
                assert!(
                    (ours / d - 1.).abs() < 1e-4,
                    "{record}: d of step {step} is {ours}, not {d}"
                );
            }
            if ![10, 20].contains(&(step + 1)) {
                continue;
            }
            let want = file.view(&format!("{index}/{}", step + 1)).unwrap().to_f32();
            let got = sample(&run.params, &run.weights());
            worst.push((difference(&got, &want, &start), format!("{step} {record}")));
            let key = format!("{index}/{}/evaluation", step + 1);
            let evaluation = run.optimizer.evaluation_weights(&run.params).unwrap();
            assert_eq!(evaluation.is_some(), file.shape(&key).is_some(), "{record}");
            if let Some(weights) = evaluation {
                let want = file.view(&key).unwrap().to_f32();
                let got = sample(&run.params, &weights);
                worst.push((difference(&got, &want, &start), format!("{key} {record}")));
            }
        }
    }
    let wrong: Vec<_> = worst.iter().filter(|(share, _)| share.is_nan() || *share >= 1.).collect();
    assert!(worst.len() > 100 && wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_code_of_8_bits_is_that_of_bitsandbytes() {
    let file = open_tensor_file(&data_path("trajectories.safetensors")).unwrap();
    for (name, signs) in [("code/signed", Signs::Both), ("code/unsigned", Signs::Positive)] {
        assert_eq!(file.view(name).unwrap().to_f32(), Code::of(signs).values());
    }
}

#[test]
fn every_optimizer_is_compared() {
    let compared: Vec<String> =
        records().iter().map(|record| record["name"].as_str().unwrap().to_owned()).collect();
    for name in names() {
        assert!(compared.iter().any(|other| other == name), "{name} has no reference");
    }
}

/// A choice with the settings that keep the most state.
fn with_most_state(name: &str) -> Choice {
    let arguments: &[(&str, &str)] = match name {
        "AdaFactor" => &[("beta1", "0.9")],
        "SGD" => &[("momentum", "0.9")],
        "Adam" | "AdamW" => &[("amsgrad", "True")],
        _ => &[],
    };
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let arguments: Vec<_> = arguments.iter().map(owned).collect();
    choose(name, &arguments).unwrap()
}

#[test]
fn a_saved_state_goes_on_to_the_bit() {
    for name in names() {
        for choice in [choose(name, &[]).unwrap(), with_most_state(name)] {
            let mut whole = Run::new(&choice, (0.5, 0.5), true);
            (0..10).for_each(|step| whole.step(step));
            let mut resumed = Run::new(&choice, (0.5, 0.5), true);
            resumed.params = resumed.params.with_values(&whole.weights()).unwrap();
            let state = whole.optimizer.state().unwrap();
            resumed.optimizer.load_state(state.clone()).unwrap();
            assert_eq!(resumed.optimizer.state().unwrap(), state, "{name}");
            for step in 10..20 {
                whole.step(step);
                resumed.step(step);
            }
            assert_eq!(whole.weights(), resumed.weights(), "{name}");
            let average = |run: &Run| run.optimizer.evaluation_weights(&run.params).unwrap();
            assert_eq!(average(&whole), average(&resumed), "{name}");
        }
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    for name in names() {
        let choice = with_most_state(name);
        let mut run = Run::new(&choice, (0.5, 0.5), false);
        run.step(0);
        let state = run.optimizer.state().unwrap();
        let fault = |state| match Run::new(&choice, (0.5, 0.5), false).optimizer.load_state(state) {
            Ok(()) => panic!("{name} must refuse this"),
            Err(error) => error.to_string(),
        };
        let mut more = state.clone();
        more.numbers.insert("else/tensor0".to_owned(), 1.);
        assert!(fault(more).contains("`else/tensor0`"), "{name}");
        let Some(key) = state.tensors.keys().next().cloned() else { continue };
        let mut less = state.clone();
        less.tensors.remove(&key);
        assert!(fault(less).contains(&format!("lacks the tensor: `{key}`")), "{name}");
        let mut shorter = state.clone();
        let tensor = shorter.tensors.get_mut(&key).unwrap();
        tensor.data.truncate(tensor.data.len() - tensor.dtype.size());
        assert!(fault(shorter).contains(&format!("does not fit, `{key}`")), "{name}");
    }
}

#[test]
fn a_tensor_without_a_gradient_stays_as_it_is() {
    for name in names() {
        let mut run = Run::new(&choose(name, &[]).unwrap(), (0.5, 0.5), false);
        (0..4).for_each(|step| run.step(step));
        let (before, range) = (run.weights(), run.params.range(ParamId(1)));
        run.step(4);
        let after = run.weights();
        assert_eq!(before[range.clone()], after[range.clone()], "{name}");
        let moved = (0..after.len()).filter(|i| !range.contains(i) && before[*i] != after[*i]);
        assert!(moved.count() > after.len() / 2, "{name}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let run = |name: &str, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut run = Run::new(&choose(name, &[]).unwrap(), (0.5, 0.5), false);
            (0..3).for_each(|step| run.step(step));
            run.weights()
        })
    };
    for name in names() {
        assert_eq!(run(name, 1), run(name, 3), "{name}");
    }
}

#[test]
fn an_estimated_rate_is_one_for_all() {
    for name in ["Prodigy", "DAdaptation", "DAdaptAdam", "DAdaptLion", "DAdaptSGD"] {
        let choice = choose(name, &[]).unwrap();
        let mut run = Run::new(&choice, (1., 0.5), false);
        let (gradient, tensors) = (gradient(0), tensors(&run.params, 0, (1., 0.5)));
        let input = StepInput { gradient: &gradient, tensors: &tensors, schedule_factor: 1. };
        let error = run.optimizer.step(&mut run.params, &input).unwrap_err().to_string();
        assert!(error.contains("`1` and `0.5`"), "{name}: {error}");
        let mut still = Run::new(&choice, (0., 0.), false);
        let before = still.weights();
        still.step(0);
        assert_eq!(before, still.weights(), "{name}: a warm-up begins with 0");
    }
}

#[test]
fn several_rates_are_met_before_the_run() {
    let rates = |name: &str, rates: &[f64]| choose(name, &[]).unwrap().check_rates(rates);
    for name in ["Prodigy", "DAdaptation", "DAdaptAdaGrad", "DAdaptAdanIP"] {
        assert!(rates(name, &[1., 0., 1.]).is_ok());
        let message = rates(name, &[0., 1., 0.5]).unwrap_err().to_string();
        assert!(message.contains("`1` and `0.5`") && message.contains("hint: "), "{message}");
    }
    assert!(rates("AdamW", &[1e-3, 1e-4]).is_ok());
}

#[test]
fn the_relative_step_gives_its_rate() {
    let mut run = Run::new(&choose("AdaFactor", &[]).unwrap(), (0., 0.), false);
    run.step(0);
    let rate = run.optimizer.own_rate(ParamId(0)).unwrap();
    // 0.01 times the root mean square of the weights, which are uniform in -0.5..0.5.
    assert!((0.002..0.004).contains(&rate), "{rate}");
    let given = [("relative_step".to_owned(), "False".to_owned())];
    let run = Run::new(&choose("AdaFactor", &given).unwrap(), (0., 0.), false);
    assert_eq!(run.optimizer.own_rate(ParamId(0)), None);
}
