//! What one layer's LoRA computes in training beside sd-scripts' own modules, for given random
//! numbers: dropouts and DyLoRA's ranks. `reference_scripts/make_network_parts.py` made the data.

use std::rc::Rc;

use engine::{
    DType, Device, Drawn, Draws, Dropouts, ElementLoss, Linear, LossSpec, ParamId, ParamStore,
    Tape, Tensor,
};
use serde_json::Value;

use super::target::{LayerKind, Part, Target};
use super::{Algorithm, LoraNetwork, Rank, UniformRanks, name_key};

const TARGET: &str = "lora_te_m";

/// Numbers of the reference in place of random ones.
struct Given {
    rank: Vec<f32>,
    element: Vec<f32>,
    block: f32,
}

impl Draws for Given {
    fn samples(&self) -> usize {
        2
    }

    fn uniform(&self, drawn: Drawn, module: u64, out: &mut [f32]) {
        assert_eq!(module, name_key(TARGET));
        let from = match drawn {
            Drawn::Module => &[0.5],
            Drawn::Block => std::slice::from_ref(&self.block),
            Drawn::Rank { sample } => &self.rank[sample * out.len()..],
            Drawn::Element { sample } => &self.element[sample * out.len()..],
        };
        out.copy_from_slice(&from[..out.len()]);
    }
}

fn list(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn close(what: &str, got: &[f32], want: &[f32]) {
    let size = want.iter().fold(1e-6_f32, |size, x| size.max(x.abs()));
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 2e-6 * size, "{what}: {got}, not {want}");
    }
}

/// Output, gradient of the input, and those of the parameters in the order of files.
type Outcome = (Vec<f32>, Vec<f32>, Vec<Option<Vec<f32>>>);

fn run(inputs: &Value, algorithm: Algorithm, dropouts: Dropouts, block: f32, y: &[f32]) -> Outcome {
    let target = Target {
        part: Part::TextEncoder,
        path: "m".to_owned(),
        name: TARGET.to_owned(),
        kind: LayerKind::Linear,
        out: 6,
        input: 5,
        in_transformer: true,
    };
    let rule = UniformRanks { linear: Rank::new(6, 3.), conv: None };
    let network = LoraNetwork::new(vec![target], &rule, algorithm).unwrap();
    let input = |name: &str| list(&inputs[name]);
    let mut params: Vec<(Vec<usize>, Vec<f32>)> = Vec::new();
    let module = &network.modules()[0];
    for (plan, _) in module.parts() {
        let values = input(if plan.suffix.contains("down") { "down" } else { "up" });
        params.extend(
            plan.cut(plan.engine_order(values)).into_iter().map(|v| (plan.part().shape, v)),
        );
    }
    let x = ParamId(params.len());
    params.push((vec![2, 3, 5], input("x")));
    let store = ParamStore::new(Device::Cpu, &params).unwrap();
    let weight = Tensor::from_f32(Device::Cpu, &[6, 5], &input("weight"), DType::F32).unwrap();
    let adapter = Some(algorithm.adapter(module, 1., dropouts));
    let layer = Linear { weight, bias: None, adapter };

    let draws = Given { rank: input("rank_draws"), element: input("element_draws"), block };
    let tape = Tape::new(&store, false).with_draws(Some(Rc::new(draws)));
    let out = layer.forward(&tape, &tape.param(x).unwrap()).unwrap();
    let got = out.tensor().to_vec_f32().unwrap();
    // The mean of squares of 18 numbers whose gradient is the reference's `g`.
    let aim: Vec<f32> = y.iter().zip(input("g")).map(|(y, g)| y - 9. * g).collect();
    let aim = Tensor::from_f32(Device::Cpu, &[2, 3, 6], &aim, DType::F32).unwrap();
    let (delta, weight) = (vec![1.; 2], vec![1.; 2]);
    let spec = LossSpec::new(Device::Cpu, ElementLoss::L2, &delta, &weight).unwrap();
    let loss = tape.loss(&out, &aim, &spec).unwrap();
    drop(out);
    let mut gradients = vec![None; params.len()];
    tape.backward(&loss, &mut |id, gradient| {
        gradients[id.0] = Some(gradient.to_vec_f32()?);
        Ok(())
    })
    .unwrap();
    let of_x = gradients.pop().flatten().unwrap();
    let gradients = gradients.into_iter().enumerate();
    let in_files =
        |(id, g): (usize, Option<Vec<f32>>)| g.map(|g| network.file_order(ParamId(id), &g));
    (got, of_x, gradients.map(in_files).collect())
}

fn reference() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/networks/parts.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn dropouts_are_those_of_sd_scripts() {
    let reference = reference();
    let none = Dropouts::default();
    for (name, dropouts) in [
        ("dropout", Dropouts { element: 0.25, ..none }),
        ("rank_dropout", Dropouts { rank: 0.5, ..none }),
        ("all", Dropouts { element: 0.25, rank: 0.5, module: 0.5 }),
    ] {
        let want = &reference["cases"][name];
        let y = list(&want["y"]);
        let (got, dx, gradients) = run(&reference["inputs"], Algorithm::LowRank, dropouts, 0., &y);
        close(&format!("{name}: output"), &got, &y);
        close(&format!("{name}: input"), &dx, &list(&want["dx"]));
        for (part, gradient) in ["down", "up"].iter().zip(&gradients) {
            let gradient = gradient.as_ref().unwrap();
            close(&format!("{name}: {part}"), gradient, &list(&want[*part]));
        }
    }
}

/// The reference draws a rank and rounds it down to the unit.
#[test]
fn dylora_is_that_of_sd_scripts() {
    let reference = reference();
    let algorithm = Algorithm::DyLora { unit: 2 };
    for draw in 0..6 {
        let want = &reference["cases"][format!("dylora_{draw}")];
        let (y, block) = (list(&want["y"]), draw / 2);
        assert_eq!(want["moved"], serde_json::json!([2 * block, 2 * block + 1]));
        let uniform = draw as f32 / 6. + 0.01;
        let inputs = &reference["inputs"];
        let (got, dx, gradients) = run(inputs, algorithm, Dropouts::default(), uniform, &y);
        close(&format!("{draw}: output"), &got, &y);
        close(&format!("{draw}: input"), &dx, &list(&want["dx"]));
        for (id, gradient) in gradients.iter().enumerate() {
            let part = if id < 3 { "down" } else { "up" };
            match gradient {
                Some(gradient) if id % 3 == block => {
                    close(&format!("{draw}: {part}"), gradient, &list(&want[part]));
                }
                gradient => assert!(gradient.is_none() && id % 3 != block, "{draw}: {id}"),
            }
        }
    }
}
