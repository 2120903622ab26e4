//! Buffers on an emulated card, and kernels of the module `trial`.

use engine::Result;
use engine::cuda::Address;
use engine::cuda::driver::{Arg, Driver, Launch, Stream};

/// A new card's driver.
pub fn driver() -> &'static dyn Driver {
    emulator::open(64 << 20).unwrap().card().unwrap().driver()
}

/// Reproducible numbers with few bits.
pub fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as f32 / 64. - 2.
    };
    (0..len).map(|_| next()).collect()
}

pub fn upload(driver: &dyn Driver, bytes: &[u8]) -> Address {
    let address = driver.allocate(bytes.len().max(1)).unwrap();
    driver.upload(Stream::Compute, address, bytes).unwrap();
    address
}

pub fn upload_f32(driver: &dyn Driver, data: &[f32]) -> Address {
    let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    upload(driver, &bytes)
}

pub fn download(driver: &dyn Driver, from: Address, bytes: usize) -> Vec<u8> {
    let mut to = vec![0; bytes];
    driver.download(Stream::Compute, &mut to, from).unwrap();
    to
}

pub fn download_f32(driver: &dyn Driver, from: Address, len: usize) -> Vec<f32> {
    let bytes = download(driver, from, 4 * len);
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Starts a kernel of `trial` on `blocks` blocks of `threads` with 4 bytes of shared memory each.
pub fn launch(
    driver: &dyn Driver,
    kernel: &str,
    (blocks, threads): (u32, u32),
    args: &[Arg],
) -> Result<()> {
    let (grid, shared) = ([blocks, 1, 1], 4 * threads);
    driver.launch(&Launch { module: "trial", kernel, grid, block: threads, shared, args })
}
