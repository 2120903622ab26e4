//! Values that ask for nothing: 0 where an option counts or weighs, as front ends write it.
//!
//! sd-scripts takes most of these as "off", divides by the others.

use crate::device;
use crate::options::{Device, LogWith, MixedPrecision, Options};

/// Unsets options whose value asks for nothing, and replaces what this machine computes otherwise.
pub(super) fn unset_neutral(options: &mut Options, notes: &mut Vec<String>) {
    let counts = [
        &mut options.clip_skip,
        &mut options.max_token_length,
        &mut options.text_encoder_batch_size,
        &mut options.max_train_epochs,
        &mut options.max_timestep,
        &mut options.save_every_n_epochs,
        &mut options.save_every_n_steps,
        &mut options.save_n_epoch_ratio,
        &mut options.save_last_n_epochs,
        &mut options.save_last_n_steps,
        &mut options.sample_every_n_epochs,
        &mut options.sample_every_n_steps,
        &mut options.multires_noise_iterations,
    ];
    for count in counts {
        count.take_if(|count| *count == 0);
    }
    let amounts = [
        &mut options.min_snr_gamma,
        &mut options.noise_offset,
        &mut options.adaptive_noise_scale,
        &mut options.ip_noise_gamma,
        &mut options.v_pred_like_loss,
        &mut options.scale_weight_norms,
        &mut options.network_dropout,
    ];
    for amount in amounts {
        amount.take_if(|amount| *amount == 0.);
    }
    for texts in [&mut options.network_args, &mut options.optimizer_args] {
        texts.take_if(|texts| texts.is_empty());
    }
    options.text_encoder_lr.take_if(|rates| rates.is_empty());
    options.vae_batch_size = options.vae_batch_size.max(1);
    token_length(options, notes);
    precision(options, notes);
    logs(options, notes);
}

/// sd-scripts needs no folder for `wandb`, which makes one where the command is run.
fn logs(options: &mut Options, notes: &mut Vec<String>) {
    if options.log_with == Some(LogWith::Wandb)
        && options.logging_dir.is_none()
        && let Some(folder) = &options.output_dir
    {
        let logs = folder.join("logs");
        notes.push(format!("`logging_dir` is not given: logs go to `{}`", logs.display()));
        options.logging_dir = Some(logs);
    }
}

/// 75 is the default, also written as the 77 of the text encoder. The reference cuts any number
/// above 225 into windows of 75 and stops after three.
fn token_length(options: &mut Options, notes: &mut Vec<String>) {
    options.max_token_length.take_if(|length| matches!(length, 75 | 77));
    if let Some(length) = options.max_token_length.filter(|length| (226..300).contains(length)) {
        notes
            .push(format!("`max_token_length` is read as 225, the longest there is, not {length}"));
        options.max_token_length = Some(225);
    }
}

/// fp16 has a finer mantissa than bf16, and a CPU has no fast arithmetic for it: float32 holds
/// everything that was asked for, bf16 would not.
fn precision(options: &mut Options, notes: &mut Vec<String>) {
    if options.mixed_precision == MixedPrecision::Fp16
        && device::choice(options.device) == Device::Cpu
    {
        options.mixed_precision = MixedPrecision::No;
        notes.push(
            "`mixed_precision = \"fp16\"` is computed in float32 on the CPU, which is more exact; \
             `bf16` needs half the memory"
                .to_owned(),
        );
    }
}
