//! Option list: performance switches of the reference, DeepSpeed and uploads to a hub.
//!
//! The doc comment of an entry is what `lorarun train --help` prints.

macro_rules! performance_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Performance {
        /// Memory-efficient attention of the xformers library.
        xformers: bool = false, NoEffect("attention is always memory-efficient");
        /// Attention of PyTorch 2.
        sdpa: bool = false, NoEffect("attention is always memory-efficient");
        /// Memory-efficient attention.
        mem_eff_attn: bool = false, NoEffect("attention is always memory-efficient");
        /// Give the steps to the card piece by piece. Without this the second step of each image size
        /// is captured (as a CUDA graph) and then repeated as one piece, which is faster.
        no_cuda_graph: bool = false, Supported;
        /// Compile the model with PyTorch.
        torch_compile: bool = false, NoEffect("there is no PyTorch to compile for");
        /// Compiler of `--torch_compile`. Default `inductor`.
        dynamo_backend: DynamoBackend = DynamoBackend::Inductor, NoEffect("there is no PyTorch to compile for");
        /// Load the model without a copy in main memory.
        lowram: bool = false, NoEffect("the base model is memory-mapped, never copied as a whole");
        /// Read the model's file as a whole instead of mapping it.
        disable_mmap_load_safetensors: bool = false, NoEffect("the base model is memory-mapped, never copied as a whole");
        /// Keep caches of the graphics memory.
        highvram: bool = false, NoEffect("memory is pooled by this program itself");
        /// Minutes a rank waits for the others.
        ddp_timeout: Option<usize> = None, NoEffect("every exchange between ranks has its own deadline");
        /// Layout of gradients between processes.
        ddp_gradient_as_bucket_view: bool = false, NoEffect("gradients are always reduced in place in flat buckets");
        /// The graph of a step never changes.
        ddp_static_graph: bool = false, NoEffect("the order of a step's gradients is always fixed");
    } } };
}

macro_rules! deepspeed_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Deepspeed {
        /// Train with DeepSpeed.
        deepspeed: bool = false, Refused("DeepSpeed divides trained weights among processes, and a LoRA's are few; start several ranks with `lorarun --num_processes N train ...`");
        /// What DeepSpeed divides among processes (0 to 3). Default 2.
        zero_stage: usize = 2, NoEffect("it is a setting of `deepspeed`");
        /// Where DeepSpeed puts the optimizer's state.
        offload_optimizer_device: Option<OffloadDevice> = None, NoEffect("it is a setting of `deepspeed`");
        /// Folder for the optimizer's state.
        offload_optimizer_nvme_path: Option<PathBuf> = None, NoEffect("it is a setting of `deepspeed`");
        /// Where DeepSpeed puts weights.
        offload_param_device: Option<OffloadDevice> = None, NoEffect("it is a setting of `deepspeed`");
        /// Folder for weights.
        offload_param_nvme_path: Option<PathBuf> = None, NoEffect("it is a setting of `deepspeed`");
        /// Divide weights while building the model.
        zero3_init_flag: bool = false, NoEffect("it is a setting of `deepspeed`");
        /// Save divided weights as 16-bit numbers.
        zero3_save_16bit_model: bool = false, NoEffect("it is a setting of `deepspeed`");
        /// Keep weights and gradients in float16.
        fp16_master_weights_and_gradients: bool = false, NoEffect("it is a setting of `deepspeed`");
    } } };
}

macro_rules! hub_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Hub {
        /// Repository at the Hugging Face hub to upload trained files to.
        huggingface_repo_id: Option<String> = None, NotYet("nothing is uploaded: take it out and upload the files of `output_dir` with `hf upload`");
        /// Kind of that repository.
        huggingface_repo_type: Option<String> = None, NoEffect("it is a setting of `huggingface_repo_id`");
        /// Folder in that repository.
        huggingface_path_in_repo: Option<String> = None, NoEffect("it is a setting of `huggingface_repo_id`");
        /// Access token for uploads.
        huggingface_token: Option<String> = None, NoEffect("it is a setting of `huggingface_repo_id`");
        /// `public`, or private when not given.
        huggingface_repo_visibility: Option<String> = None, NoEffect("it is a setting of `huggingface_repo_id`");
        /// Upload saved states too.
        save_state_to_huggingface: bool = false, NotYet("nothing is uploaded: take it out, states are kept in `output_dir`");
        /// Go on from a state in a repository.
        resume_from_huggingface: bool = false, NotYet("download the state and name its folder as `resume`");
        /// Upload while training goes on.
        async_upload: bool = false, NoEffect("it is a setting of `huggingface_repo_id`");
    } } };
}
