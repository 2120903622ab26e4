//! Every rule of the lint on a config that breaks it, and none on a sound one.

use crate::options::parse;
use std::ffi::OsString;

/// The advice on a small sound run with more words.
fn advice(more: &[&str]) -> String {
    let sound = [
        "--config-check",
        "--pretrained_model_name_or_path=m",
        "--output_dir=o",
        "--train_data_dir=t",
        "--resolution=512",
        "--enable_bucket",
        "--cache_latents",
        "--learning_rate=3e-4",
        "--network_alpha=4",
        "--max_train_epochs=4",
        "--seed=1",
        "--save_precision=fp16",
    ];
    let words: Vec<OsString> = sound.iter().chain(more).map(OsString::from).collect();
    super::lint(&parse(&words).unwrap().options).join("\n")
}

#[test]
fn a_sound_config_gets_no_advice() {
    assert_eq!(advice(&[]), "");
    let usual = ["--min_snr_gamma=5", "--noise_offset=0.05", "--network_dim=32"];
    assert_eq!(
        advice(&[&usual[..], &["--network_alpha=16", "--lr_scheduler=cosine"]].concat()),
        ""
    );
}

#[test]
fn unusual_settings_get_advice() {
    let cases: [(&[&str], &str); 29] = [
        (&["--lr_scheduler=linear", "--lr_scheduler_power=2"], "`linear` does not read it"),
        (&["--lr_scheduler=warmup_stable_decay"], "never falls without `lr_decay_steps`"),
        (&["--conditioning_data_dir=m"], "`masked_loss` is not set"),
        (&["--loss_type=huber", "--huber_scale=2"], "which sd-scripts does not scale"),
        (&["--noise_offset=0.05", "--multires_noise_iterations=6"], "serves the same end"),
        (&["--learning_rate=1"], "far above what `AdamW` takes"),
        (&["--optimizer_type=Lion", "--unet_lr=2e-3"], "far above what `Lion` takes"),
        (&["--optimizer_type=Prodigy"], "only a factor on the rate that `Prodigy` finds"),
        (
            &["--network_train_unet_only", "--text_encoder_lr=1e-5"],
            "has no effect: `network_train_unet_only`",
        ),
        (&["--text_encoder_lr=0"], "still writes the text encoder's modules"),
        (&["--train_batch_size=16", "--learning_rate=1e-4"], "averages 16 images"),
        (&["--network_alpha=8"], "is above `network_dim`: the LoRA's output is multiplied by 2"),
        (
            &["--network_dim=64", "--network_alpha=1", "--learning_rate=1e-4"],
            "divides the LoRA's output by 64",
        ),
        (&["--network_dim=512", "--network_alpha=256"], "4 to 32 serve most: `512`"),
        (&["--cache_latents=false"], "every step encodes its images anew"),
        (&["--resolution=500"], "not a multiple of 64: `500,500`"),
        (&["--resolution=2048"], "repeat their subjects"),
        (&["--enable_bucket=false", "--max_bucket_reso=2048"], "`enable_bucket` is not set"),
        (&["--keep_tokens=1"], "neither `shuffle_caption` nor"),
        (&["--min_snr_gamma=0.5"], "acts stronger the lower it is"),
        (&["--noise_offset=1"], "washes images out"),
        (&["--huber_c=0.2"], "for the losses `huber`"),
        (&["--max_train_steps=100"], "`max_train_epochs` is given"),
        (&["--save_every_n_epochs=8"], "never saves before the end: `8` of 4 epochs"),
        (&["--prior_loss_weight=0.5"], "there is no `reg_data_dir`"),
        (&["--log_prefix=x"], "there is no `logging_dir`"),
        (&["--min_timestep=900"], "leaves 100 of 1000 timesteps"),
        (&["--v_parameterization"], "unusual for Stable Diffusion 1"),
        (&["--caption_dropout_rate=0.9"], "most images without their caption"),
    ];
    for (words, expected) in cases {
        let text = advice(words);
        assert!(text.contains(expected), "{words:?}: {text}");
    }
}
