//! Keys of adapter files taken apart: which module, which of its tensors, in whose naming.

use super::Naming;

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Down,
    Up,
    Mid,
    Alpha,
    DoraScale,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    Diff,
    DiffB,
    NormW,
    NormB,
}

/// Endings of keys. The first that fits counts.
const ENDINGS: [(&str, Role); 36] = [
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::DoraScale),
    (".hada_w1_a", Role::HadaW1A),
    (".hada_w1_b", Role::HadaW1B),
    (".hada_w2_a", Role::HadaW2A),
    (".hada_w2_b", Role::HadaW2B),
    (".hada_t1", Role::HadaT1),
    (".hada_t2", Role::HadaT2),
    (".lokr_w1", Role::LokrW1),
    (".lokr_w1_a", Role::LokrW1A),
    (".lokr_w1_b", Role::LokrW1B),
    (".lokr_w2", Role::LokrW2),
    (".lokr_w2_a", Role::LokrW2A),
    (".lokr_w2_b", Role::LokrW2B),
    (".lokr_t2", Role::LokrT2),
    (".diff", Role::Diff),
    (".diff_b", Role::DiffB),
    (".w_norm", Role::NormW),
    (".b_norm", Role::NormB),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    // `to_q_lora.down.weight` of attention processors.
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_magnitude_vector", Role::DoraScale),
    (".lora_magnitude_vector.weight", Role::DoraScale),
    (".lora_magnitude_vector.default.weight", Role::DoraScale),
    (".lora_magnitude_vector.default", Role::DoraScale),
];

/// Which network of a model a module belongs to, as far as its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Unet,
    /// The only text encoder, or the first of two.
    Text,
    /// Said to be the first of two.
    Text1,
    Text2,
}

/// A key taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key<'k> {
    /// What stands before the ending.
    pub stored: &'k str,
    pub role: Role,
    pub naming: Naming,
    pub part: Part,
    /// The layer's path within its network, dots written as underscores.
    pub layer: String,
}

/// `None` for a key that no rule knows.
pub(super) fn parse(key: &str) -> Option<Key<'_>> {
    let (stored, role) = split_ending(key)?;
    let naming = if stored.starts_with("lora_") {
        Naming::Kohya
    } else if key.contains(".lora_A.") || key.contains(".lora_B.") || key.starts_with(PEFT) {
        Naming::Peft
    } else {
        Naming::Diffusers
    };
    let (part, layer) = place(stored)?;
    Some(Key { stored, role, naming, part, layer })
}

/// What stands before the ending, and the ending's meaning.
pub(super) fn split_ending(key: &str) -> Option<(&str, Role)> {
    let found = ENDINGS.iter().find_map(|(ending, role)| Some((key.strip_suffix(ending)?, *role)));
    found.filter(|(stored, _)| !stored.is_empty())
}

/// What PEFT puts before every name.
const PEFT: &str = "base_model.model.";

/// The network and the layer of a module's stored name.
pub(super) fn place(stored: &str) -> Option<(Part, String)> {
    const KOHYA: [(&str, Part); 4] = [
        ("lora_unet_", Part::Unet),
        ("lora_te_", Part::Text),
        ("lora_te1_", Part::Text1),
        ("lora_te2_", Part::Text2),
    ];
    for (prefix, part) in KOHYA {
        if let Some(layer) = stored.strip_prefix(prefix) {
            return (!layer.is_empty() && !layer.contains('.')).then(|| (part, layer.to_owned()));
        }
    }
    const DOTTED: [(&str, Part); 4] = [
        ("unet.", Part::Unet),
        ("diffusion_model.", Part::Unet),
        ("text_encoder.", Part::Text),
        ("text_encoder_2.", Part::Text2),
    ];
    let bare = stored.strip_prefix(PEFT).unwrap_or(stored);
    let named = DOTTED.iter().find_map(|(prefix, part)| Some((*part, bare.strip_prefix(prefix)?)));
    let (part, path) = named.or_else(|| Some((part_of_bare(bare)?, bare)))?;
    let path = path.strip_prefix(PEFT).unwrap_or(path);
    // Alphas may keep what their weights' names have before `.down.weight`.
    let path = ["_lora", ".lora", ".lora_linear_layer"]
        .iter()
        .find_map(|ending| path.strip_suffix(ending))
        .unwrap_or(path);
    let path = match part {
        Part::Unet => unet_path(path),
        Part::Text | Part::Text1 | Part::Text2 => text_path(path),
    };
    (!path.is_empty()).then(|| (part, path.replace('.', "_")))
}

/// Names without a prefix, told by how the networks' own names begin.
fn part_of_bare(path: &str) -> Option<Part> {
    const UNET: [&str; 11] = [
        "down_blocks.",
        "mid_block.",
        "up_blocks.",
        "input_blocks.",
        "middle_block.",
        "output_blocks.",
        "conv_in",
        "conv_out",
        "time_embedding.",
        "add_embedding.",
        "conv_norm_out",
    ];
    const TEXT: [&str; 2] = ["text_model.", "encoder.layers."];
    if UNET.iter().any(|start| path.starts_with(start)) {
        Some(Part::Unet)
    } else {
        TEXT.iter().any(|start| path.starts_with(start)).then_some(Part::Text)
    }
}

fn unet_path(path: &str) -> String {
    let path = path.replace(".processor.", ".");
    // `to_out_lora` is the LoRA of `to_out.0`.
    if path.ends_with(".to_out") { format!("{path}.0") } else { path }
}

fn text_path(path: &str) -> String {
    const OLD: [(&str, &str); 4] = [
        (".to_q", ".q_proj"),
        (".to_k", ".k_proj"),
        (".to_v", ".v_proj"),
        (".to_out", ".out_proj"),
    ];
    let renamed =
        OLD.iter().find_map(|(old, new)| Some(format!("{}{new}", path.strip_suffix(old)?)));
    let path = renamed.unwrap_or_else(|| path.to_owned());
    // Newer transformers leave the outer name out.
    let inner = ["encoder.", "embeddings.", "final_layer_norm"];
    if inner.iter().any(|start| path.starts_with(start)) {
        return format!("text_model.{path}");
    }
    path
}

/// What kind of file tells a key that no rule knows.
pub(super) fn describe_stranger(key: &str) -> &'static str {
    let has = |parts: &[&str]| parts.iter().any(|part| key.contains(part));
    if has(&["double_blocks", "single_blocks", "single_transformer_blocks", "joint_blocks"])
        || key.starts_with("transformer.")
        || key.starts_with("lora_transformer_")
    {
        "it belongs to another family than Stable Diffusion 1, 2 and XL, this key tells"
    } else if has(&["oft_", ".boft", ".on_input", ".a1.weight", ".b1.weight", "vera_"]) {
        "it is a LyCORIS or PEFT network of a kind that is not supported, this key tells"
    } else if has(&["model.diffusion_model.", "first_stage_model.", "cond_stage_model."]) {
        "it is a model, this key tells"
    } else {
        "this key is none of an adapter's"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(key: &str) -> (Part, String, Role, Naming) {
        let key = parse(key).unwrap_or_else(|| panic!("{key}"));
        (key.part, key.layer, key.role, key.naming)
    }

    #[test]
    fn one_layer_in_every_naming() {
        let query = "down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q";
        let dotted = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q";
        let processor = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora";
        let cases = [
            (format!("lora_unet_{query}.lora_down.weight"), Naming::Kohya),
            (format!("unet.{dotted}.lora_A.weight"), Naming::Peft),
            (format!("unet.base_model.model.{dotted}.lora_A.weight"), Naming::Peft),
            (format!("base_model.model.{dotted}.lora_A.weight"), Naming::Peft),
            (format!("base_model.model.unet.{dotted}.lora_A.default.weight"), Naming::Peft),
            (format!("unet.{dotted}.lora.down.weight"), Naming::Diffusers),
            (format!("unet.{processor}.down.weight"), Naming::Diffusers),
            (format!("{processor}.down.weight"), Naming::Diffusers),
        ];
        for (key, naming) in cases {
            assert_eq!(parsed(&key), (Part::Unet, query.to_owned(), Role::Down, naming), "{key}");
        }
        for key in [
            format!("unet.{dotted}.alpha"),
            format!("unet.{dotted}.lora.alpha"),
            format!("unet.{processor}.alpha"),
        ] {
            let expected = (Part::Unet, query.to_owned(), Role::Alpha, Naming::Diffusers);
            assert_eq!(parsed(&key), expected, "{key}");
        }
    }

    #[test]
    fn the_output_projection_and_text_layers() {
        let cases = [
            ("unet.a.attn1.processor.to_out_lora.up.weight", Part::Unet, "a_attn1_to_out_0"),
            ("unet.a.attn1.to_out.0.lora.up.weight", Part::Unet, "a_attn1_to_out_0"),
            (
                "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
                Part::Text,
                "text_model_encoder_layers_3_self_attn_q_proj",
            ),
            (
                "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.up.weight",
                Part::Text,
                "text_model_encoder_layers_3_self_attn_out_proj",
            ),
            (
                "text_encoder_2.encoder.layers.3.mlp.fc1.lora_B.weight",
                Part::Text2,
                "text_model_encoder_layers_3_mlp_fc1",
            ),
            (
                "lora_te2_text_model_encoder_layers_3_mlp_fc1.lora_up.weight",
                Part::Text2,
                "text_model_encoder_layers_3_mlp_fc1",
            ),
        ];
        for (key, part, layer) in cases {
            let (got_part, got_layer, role, _) = parsed(key);
            assert_eq!((got_part, got_layer.as_str(), role), (part, layer, Role::Up), "{key}");
        }
    }

    #[test]
    fn strangers_are_not_guessed() {
        for key in [
            "lora_unet_a.weight",
            "lora_unet_.alpha",
            ".alpha",
            "lora_unet_a.b.alpha",
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
            "lora_prior_a.lora_down.weight",
            "lora_unet_a.oft_blocks",
        ] {
            assert_eq!(parse(key), None, "{key}");
        }
    }
}
