//! Option list: length and precision of the run, optimizer and learning rate, noise and loss.
//!
//! The doc comment of an entry is what `lorarun train --help` prints.

macro_rules! training_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Training {
        /// Optimizer steps of the whole run. Default 1600; `--max_train_epochs` wins over it.
        max_train_steps: usize = 1600, Supported;
        /// Epochs of the run, each image once (times its repeats) per epoch.
        max_train_epochs: Option<usize> = None, Supported;
        /// Add up the gradients of this many batches before a step. Default 1. Acts like a larger
        /// batch without its memory.
        gradient_accumulation_steps: usize = 1, Supported;
        /// Let a run that goes on from a state take the batch that this config and this number of
        /// processes make. (Without it the images of a step stay those of the state: fewer or more
        /// processes share them, and a number that cannot share them evenly is refused.) It goes on
        /// at the step whose images begin nearest at or before those that were seen; until the epoch
        /// ends some images can come twice or not at all. Steps and the learning rate's schedule
        /// follow the new count, epochs stay epochs.
        allow_batch_change: bool = false, Supported;
        /// Start of all random numbers. The same seed and config give the same file. Default: a
        /// random one, written to the log and the file.
        seed: Option<u64> = None, Supported;
        /// Also keep an exponential moving average of the LoRA and write it as `NAME-ema` beside
        /// every file: smoother than the last weights, often the better picture. The share of the
        /// average that stays in each step: 0.99 looks back over 100 steps, 0.999 over 1000; it is
        /// lower in the first steps. Default: none.
        ema_decay: Option<f64> = None, Supported;
        /// How many steps in a row may be left out because their loss or gradient is not finite
        /// before the run stops. Default 10; 0 stops at the first. A step that is left out counts
        /// as a step of the run and changes no weight; no file is written until a good one.
        max_skipped_steps: usize = 10, Supported;
        /// Train the same bytes on 1, 2, 4, 8... processes of the same global batch. (Without it
        /// they agree to rounding, and the same number of processes to the byte.) Samples go
        /// through the model one by one and their gradients are added in a fixed tree, which costs
        /// time where a process has more than one sample; see `benches/README.md`.
        reproducible: bool = false, Supported;
        /// Precision of the frozen model's arithmetic: `no` (float32), `bf16` (half the memory), or
        /// `fp16` (the same, for cards without bf16: the loss is scaled so that small gradients do not
        /// vanish; a CPU computes it in float32). LoRA weights stay float32. Default `no`.
        mixed_precision: MixedPrecision = MixedPrecision::No, Supported;
        /// Round the LoRA's weights to float16 after each step, as if they were kept in it. Small
        /// updates are lost that way; gradients and the optimizer's state stay float32. Needs
        /// `mixed_precision = "fp16"`.
        full_fp16: bool = false, Supported;
        /// Round the LoRA's weights to bfloat16 after each step, as if they were kept in it. Updates
        /// below a 256th of a weight are lost that way; gradients and the optimizer's state stay
        /// float32. Needs `mixed_precision = "bf16"`.
        full_bf16: bool = false, Supported;
        /// Keep the frozen U-Net's weights in 8-bit floats on a card (E4M3, one scale for each output
        /// channel): half the memory of bf16, coarser weights, the same arithmetic. Norms, biases,
        /// the time embedding, the first and last convolution and the text encoder stay as they are.
        /// `vram_limit` turns it on where nothing else helps. On the CPU it has no effect.
        fp8_base: bool = false, Supported;
        /// The same as `--fp8_base`.
        fp8_base_unet: bool = false, Supported;
        /// Compute block by block again in the backward pass instead of keeping everything: less
        /// memory, about a third more time, the same result to the bit.
        gradient_checkpointing: bool = false, Supported;
        /// Move checkpointed tensors to main memory.
        cpu_offload_checkpointing: bool = false, NoEffect("the CPU computes, so tensors are in main memory already");
        /// Keep the VAE in float32 under mixed precision; some autoencoders overflow in float16. On
        /// the CPU it always is.
        no_half_vae: bool = false, Supported;
    } } };
}

macro_rules! optimizer_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Optimizer {
        /// Optimizer, in any case. Default `AdamW`. `AdamW8bit` keeps its state in a quarter of the
        /// memory, `AdaFactor` and `CAME` in less; `Lion` wants a learning rate 3 to 10 times lower;
        /// `Prodigy` and the `DAdaptation` family find the rate by themselves, with
        /// `--learning_rate 1.0`; `AdamWScheduleFree` needs no schedule. Also `Adam`, `Adam8bit`,
        /// `SGD`, `SGDNesterov`, `SGDNesterov8bit`, `Lion8bit`, `PagedAdamW`, `PagedAdamW8bit`,
        /// `PagedAdamW32bit`, `PagedLion8bit`, `DAdaptAdam`, `DAdaptAdaGrad`, `DAdaptAdan`,
        /// `DAdaptAdanIP`, `DAdaptLion`, `DAdaptSGD`, `RAdamScheduleFree`, `SGDScheduleFree`,
        /// `RAdam`, `AdEMAMix`, `AdEMAMix8bit`, `PagedAdEMAMix8bit`, and the Python paths of these
        /// classes, such as `prodigyopt.Prodigy`.
        optimizer_type: String = String::new(), Supported;
        /// Old way to write `--optimizer_type AdamW8bit`.
        use_8bit_adam: bool = false, Supported;
        /// Old way to write `--optimizer_type Lion`.
        use_lion_optimizer: bool = false, Supported;
        /// Settings of the optimizer as `key=value`, under the names of its Python class:
        /// `weight_decay=0.01` `betas=0.9,0.999` `eps=1e-8` (these are AdamW's defaults). A key that
        /// it does not have is refused with those that it has.
        optimizer_args: Option<Vec<String>> = None, Supported;
        /// Learning rate of everything that has no rate of its own. Default 2e-06, which is low
        /// for a LoRA: 1e-4 to 1e-3 is usual.
        learning_rate: f64 = 2.0e-6, Supported;
        /// Learning rate of the U-Net's modules. Default: `--learning_rate`.
        unet_lr: Option<f64> = None, Supported;
        /// Learning rate of the text encoder's modules, a bit lower than the U-Net's is usual.
        /// Default: `--learning_rate`. 0 leaves it untrained.
        text_encoder_lr: Option<Vec<f64>> = None, Supported;
        /// Scale all gradients down when their common norm exceeds this. Default 1.0; 0 never.
        max_grad_norm: f64 = 1.0, Supported;
        /// Course of the learning rate. `constant` (the default), `constant_with_warmup`; falling to
        /// 0: `linear`, `cosine`, `polynomial`, `cosine_with_restarts`; falling less:
        /// `cosine_with_min_lr`, `inverse_sqrt`; `warmup_stable_decay` stays high and falls in the
        /// last `--lr_decay_steps`; `piecewise_constant` takes `step_rules`; `adafactor` is chosen by
        /// that optimizer itself. A schedule-free optimizer needs none.
        lr_scheduler: LrScheduler = LrScheduler::Constant, Supported;
        /// Steps in which the rate rises from 0: a number, or a share of all steps (`0.1`, `10%`).
        /// Default 0. Must not be longer than the run.
        lr_warmup_steps: IntOrFloat = IntOrFloat::Steps(0), Supported;
        /// Steps at the end in which the rate of `warmup_stable_decay` falls: a number, or a share
        /// of all steps. Default 0: it never falls.
        lr_decay_steps: IntOrFloat = IntOrFloat::Steps(0), Supported;
        /// How often `cosine_with_restarts` falls to 0 (it starts again at the full rate), or half
        /// waves of `cosine_with_min_lr` and `warmup_stable_decay` (3 falls, rises and falls).
        /// Default 1.
        lr_scheduler_num_cycles: usize = 1, Supported;
        /// Exponent of `polynomial`. Default 1, which is a line; 2 falls faster at first.
        lr_scheduler_power: f64 = 1.0, Supported;
        /// Steps after the warm-up in which `inverse_sqrt` falls to 0.7 of the rate, roughly: larger
        /// falls slower. Default: the warm-up's steps, or 10000 without one.
        lr_scheduler_timescale: Option<usize> = None, Supported;
        /// Lowest rate as a share of the first one, for `cosine_with_min_lr` (which needs it) and
        /// `warmup_stable_decay`.
        lr_scheduler_min_lr_ratio: Option<f64> = None, Supported;
        /// A class of `torch.optim.lr_scheduler` in place of `--lr_scheduler`, with its arguments in
        /// `--lr_scheduler_args`: ConstantLR, LinearLR, ExponentialLR, PolynomialLR, StepLR,
        /// MultiStepLR, CosineAnnealingLR, CosineAnnealingWarmRestarts. Steps are optimizer steps.
        lr_scheduler_type: String = String::new(), Supported;
        /// Settings of the schedule as `key=value`: `step_rules=1:100,0.1` for
        /// `piecewise_constant`, `lr_end=1e-6` for `polynomial`, `decay_type=linear` (or `1-sqrt`)
        /// for `warmup_stable_decay`, `T_max=1000` `eta_min=1e-6` for CosineAnnealingLR.
        lr_scheduler_args: Option<Vec<String>> = None, Supported;
        /// Step each weight as soon as its gradient is there.
        fused_backward_pass: bool = false, NoEffect("it saves gradients of a whole model that is trained; a LoRA's are small");
    } } };
}

macro_rules! noise_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group NoiseAndLoss {
        /// Shift the noise of each channel by a random amount of this size, so that very dark and
        /// very bright images can be learned. About 0.05 to 0.1; more washes out.
        noise_offset: Option<f64> = None, Supported;
        /// Draw the offset's strength evenly between 0 and `--noise_offset` for each image.
        noise_offset_random_strength: bool = false, Supported;
        /// Add the mean of the latents, per channel and without its sign, times this value to
        /// `--noise_offset`, which it requires: bright and dark images get more. About 0.1; negative
        /// values take away, down to 0.
        adaptive_noise_scale: Option<f64> = None, Supported;
        /// Add coarser and coarser noise in this many octaves (6 to 10; they end at a single pixel),
        /// so that large shapes and brightness are learned. An alternative to `--noise_offset`.
        multires_noise_iterations: Option<usize> = None, Supported;
        /// How much weaker each octave is than the one before (above 0, up to 1). Default 0.3; 0.8
        /// or more with few octaves makes strong effects.
        multires_noise_discount: f64 = 0.3, Supported;
        /// Mix this much further noise into the latents that the model is not asked to find, which
        /// makes it forgive its own errors (input perturbation). About 0.1.
        ip_noise_gamma: Option<f64> = None, Supported;
        /// Draw the perturbation's strength evenly between 0 and `--ip_noise_gamma` for each image.
        ip_noise_gamma_random_strength: bool = false, Supported;
        /// Rescale the noise schedule so that the last timestep is pure noise. Meant for models
        /// with v prediction.
        zero_terminal_snr: bool = false, Supported;
        /// Lowest timestep to train (0 to 999). Default 0.
        min_timestep: Option<usize> = None, Supported;
        /// End of the timesteps to train, not included (1 to 1000). Default 1000. The same number as
        /// `--min_timestep` trains that timestep alone.
        max_timestep: Option<usize> = None, Supported;
        /// Weigh timesteps by min(SNR, gamma) / SNR, which calms training. The paper uses 5; a
        /// lower value acts stronger.
        min_snr_gamma: Option<f64> = None, Supported;
        /// Weigh timesteps by 1 / sqrt(SNR).
        debiased_estimation_loss: bool = false, Supported;
        /// Weigh the v-prediction loss as the noise-prediction loss would be; only with
        /// `--v_parameterization`.
        scale_v_pred_loss_like_noise_pred: bool = false, Supported;
        /// Add this share of a v-prediction-like loss; not with `--v_parameterization`.
        v_pred_like_loss: Option<f64> = None, Supported;
        /// Error between prediction and target: `l2` (default), `l1`, `huber`, `smooth_l1`. The
        /// last three mind outliers less.
        loss_type: LossType = LossType::L2, Supported;
        /// How the threshold of huber and smooth_l1 depends on the timestep: `constant`,
        /// `exponential` (falls from 1 to `--huber_c` with the noise), `snr` (falls with the
        /// signal-to-noise ratio, the default).
        huber_schedule: HuberSchedule = HuberSchedule::Snr, Supported;
        /// Threshold between the square and the linear part. Default 0.1.
        huber_c: f64 = 0.1, Supported;
        /// Factor on that threshold, with the schedules `constant` and `exponential`. Default 1.0.
        huber_scale: f64 = 1.0, Supported;
        /// Weight of regularization images in the loss. Default 1.0.
        prior_loss_weight: f64 = 1.0, Supported;
    } } };
}
