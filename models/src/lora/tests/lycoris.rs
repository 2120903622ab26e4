//! LyCORIS' presets and files on Stable Diffusion 1
//! (`tests/data/reference_scripts/make_lycoris_keys.py`).

use std::collections::BTreeSet;

use super::*;

fn all_targets() -> Vec<Target> {
    let mut targets = sd1_targets();
    targets.extend(outer_targets(&unet(&UnetConfig::sd1())));
    targets
}

fn preset_network(preset: Preset, conv: Rank, algorithm: Algorithm) -> LoraNetwork {
    let rule = PresetRanks { preset, linear: Rank::new(8, 4.), conv };
    LoraNetwork::new(all_targets(), &rule, algorithm).unwrap()
}

#[test]
fn presets_choose_the_layers_of_lycoris() {
    let want = reference("lycoris");
    assert_eq!(want["presets"].as_object().unwrap().len(), Preset::NAMES.len());
    for (name, preset) in Preset::NAMES {
        let network = preset_network(preset, Rank::new(4, 1.), Algorithm::LowRank);
        let got: BTreeSet<&str> = network.modules().iter().map(|m| &*m.target.name).collect();
        let names = want["presets"][name].as_array().unwrap();
        let want: BTreeSet<&str> = names.iter().map(|name| name.as_str().unwrap()).collect();
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn full_size_files_have_the_keys_shapes_and_alphas_of_lycoris() {
    let want = reference("lycoris");
    let make = |form, tucker| Algorithm::Composed(Composition { form, tucker, magnitude: false });
    let kronecker = |split| make(Form::Kronecker(split), false);
    let eighths = kronecker(Split { factor: 8, ..Split::default() });
    let both = kronecker(Split { decompose_both: true, ..Split::default() });
    let networks = [
        ("loha", Rank::new(4, 1.), make(Form::Hadamard, true)),
        ("lokr", Rank::new(8, 4.), eighths),
        ("lokr_default", Rank::new(2, 4.), both),
    ];
    for (name, conv, algorithm) in networks {
        let network = preset_network(Preset::Full, conv, algorithm);
        let want = &want["networks"][name];
        let (mut shapes, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
        for module in network.modules() {
            let module_name = &module.target.name;
            if module.target.part == Part::TextEncoder && !module_name.contains("layers_0_") {
                continue;
            }
            alphas.insert(module_name.clone(), module.rank.alpha.into());
            for (plan, _) in module.parts() {
                let key = format!("{module_name}.{}", plan.suffix);
                shapes.insert(key, plan.file_shape.clone().into());
            }
        }
        assert_eq!(Value::from(alphas), want["alphas"], "{name}");
        assert_eq!(shapes.len(), want["shapes"].as_object().unwrap().len(), "{name}");
        for (key, shape) in &shapes {
            assert_eq!(*shape, want["shapes"][key], "{key} of {name}");
        }
    }
}
