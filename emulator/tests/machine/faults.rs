//! What a card would hang at, fault at or answer with chance is an error with the kernel's name.

use engine::cuda::driver::{Arg, Stream};

use crate::trial::{download_f32, driver, launch, numbers, upload_f32};

#[track_caller]
fn refused(result: engine::Result<()>, kernel: &str, why: &str) {
    let text = result.unwrap_err().to_string();
    assert!(text.contains(kernel) && text.contains(why), "{text}");
}

#[test]
fn threads_that_wait_for_ever_are_found() {
    let driver = driver();
    let out = [Arg::Address(driver.allocate(1024).unwrap())];
    refused(
        launch(driver, "hang_f32", (1, 64), &out),
        "hang_f32",
        "32 of 64 have ended, 32 are at",
    );
    refused(launch(driver, "diverge_f32", (1, 64), &out), "diverge_f32", "wait for ever");
    // And the card goes on working.
    let x = upload_f32(driver, &numbers(32, 1));
    let args = [out[0], out[0], Arg::Address(x)];
    launch(driver, "reduce_f32", (1, 32), &args).unwrap();
}

#[test]
fn missing_barriers_and_waits_show() {
    let driver = driver();
    let x = numbers(128, 3);
    let out = driver.allocate(4 * 256).unwrap();
    let source = upload_f32(driver, &x);
    let pass = |barrier: i32, wait: i32| {
        let args = [Arg::Address(out), Arg::Address(source), Arg::I32(barrier), Arg::I32(wait)];
        launch(driver, "pass_f32", (2, 128), &args).unwrap();
        download_f32(driver, out, 256)
    };
    let rotated: Vec<f32> = (0..256).map(|i| x[(i + 1) % 128]).collect();
    assert_eq!(pass(1, 1), rotated);
    assert!(pass(0, 1).iter().any(|x| x.is_nan()));
    assert!(pass(1, 0).iter().any(|x| x.is_nan()));
}

#[test]
fn vector_access_must_be_aligned() {
    let driver = driver();
    let x = numbers(16, 4);
    let out = driver.allocate(16).unwrap();
    let source = upload_f32(driver, &x);
    let args = |offset| [Arg::Address(out), Arg::Address(source), Arg::I32(offset)];
    launch(driver, "vector_f32", (1, 1), &args(8)).unwrap();
    assert_eq!(download_f32(driver, out, 4), x[8..12]);
    refused(launch(driver, "vector_f32", (1, 1), &args(3)), "vector_f32", "trial.cu");
}

#[test]
fn kernels_must_exist_and_get_what_they_take() {
    let driver = driver();
    let none: &[Arg] = &[];
    refused(launch(driver, "absent_f32", (1, 1), none), "absent_f32", "only: vector_f32");
    refused(launch(driver, "hang_f32", (1, 1), &[Arg::I32(1)]), "hang_f32", "`p`, got: `i`");
    let out = [Arg::Address(driver.allocate(64).unwrap())];
    refused(launch(driver, "hang_f32", (0, 1), &out), "hang_f32", "grid and block");
    refused(launch(driver, "hang_f32", (1, 2000), &out), "hang_f32", "grid and block");
    let outside = [Arg::Address(4096)];
    refused(launch(driver, "hang_f32", (1, 1), &outside), "hang_f32", "do not lie within");
}

#[test]
fn copies_stay_within_what_is_allocated() {
    let driver = driver();
    let block = driver.allocate(64).unwrap();
    refused(driver.upload(Stream::Copy, block + 60, &[0; 8]), "upload", "do not lie within");
    refused(driver.zero(Stream::Compute, block, 65), "zero", "do not lie within");
    refused(driver.copy(Stream::Compute, block, block + 1, 64), "copy", "do not lie within");
    driver.free(block);
    refused(driver.zero(Stream::Compute, block, 1), "zero", "do not lie within");
    driver.free(block);
    refused(driver.synchronize(Stream::Compute), "free", "do not lie within");
}

#[test]
fn new_memory_is_no_number() {
    let driver = driver();
    let block = driver.allocate(64).unwrap();
    assert!(download_f32(driver, block, 16).iter().all(|x| x.is_nan()));
}

#[test]
fn kernels_stay_within_tensors() {
    let driver = driver();
    let block = driver.allocate(4096).unwrap();
    let out = driver.allocate(16).unwrap();
    let load = |offset| [Arg::Address(out), Arg::Address(block), Arg::I32(offset)];
    let run = |offset| launch(driver, "vector_f32", (1, 1), &load(offset));
    run(1020).unwrap();
    refused(run(1024), "vector_f32", "reads 16 bytes");
    refused(run(-4), "vector_f32", "where there is no tensor");
    // A smaller tensor in the same block.
    driver.begin_tensor(block + 256, 520).unwrap();
    run(188).unwrap();
    refused(run(192), "vector_f32", "where there is no tensor");
    driver.end_tensor(block + 256, 520);
    refused(run(64), "vector_f32", "where there is no tensor");
    // What is written is watched as well, and so is shared memory.
    driver.end_tensor(out, 16);
    refused(run(0), "vector_f32", "writes");
    let args = [Arg::Address(block), Arg::Address(block), Arg::I32(1), Arg::I32(1)];
    let launch = engine::cuda::driver::Launch {
        module: "trial",
        kernel: "pass_f32",
        grid: [1, 1, 1],
        block: 32,
        shared: 124,
        args: &args,
    };
    refused(driver.launch(&launch), "pass_f32", "beyond the block's shared memory");
}
