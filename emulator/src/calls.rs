//! One piece of work, kept as data: done at once, or by each replay of a graph.

use engine::Result;
use engine::cuda::Address;
use engine::cuda::driver::{Arg, Convolution, Launch, Matmul};

use crate::driver::Launches;
use crate::kernels::Found;
use crate::memory::Blocks;
use crate::{convolve, kernels, matmul};

/// A start of a kernel that owns what it says.
pub(crate) struct OwnedLaunch {
    found: Found,
    module: &'static str,
    kernel: String,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    args: Vec<Arg>,
}

impl OwnedLaunch {
    /// The launch, if a card would take it.
    pub(crate) fn new(launch: &Launch) -> Result<Self> {
        let found = kernels::find(launch)?;
        found.check(launch)?;
        let Launch { module, grid, block, shared, .. } = *launch;
        let (kernel, args) = (launch.kernel.to_owned(), launch.args.to_vec());
        Ok(Self { found, module, kernel, grid, block, shared, args })
    }
}

/// One piece of work.
pub(crate) enum Call {
    Upload {
        to: Address,
        bytes: Vec<u8>,
    },
    Copy {
        to: Address,
        from: Address,
        bytes: usize,
    },
    Zero {
        to: Address,
        bytes: usize,
    },
    Launch(OwnedLaunch),
    Matmul(Matmul),
    Convolve(Convolution),
    /// A tensor begins to live.
    Begin {
        address: Address,
        bytes: usize,
    },
    /// A tensor is gone.
    End {
        address: Address,
        bytes: usize,
    },
}

impl Call {
    /// Fails if the work would touch memory that is not allocated now.
    pub(crate) fn check(&self, blocks: &Blocks) -> Result<()> {
        match self {
            Call::Upload { to, bytes } => blocks.check("upload", *to, bytes.len()),
            Call::Copy { to, from, bytes } => {
                blocks.check("copy", *to, *bytes)?;
                blocks.check("copy", *from, *bytes)
            }
            Call::Zero { to, bytes } => blocks.check("zero", *to, *bytes),
            // Only the kernel knows how far it reads.
            Call::Launch(launch) => launch.args.iter().try_for_each(|arg| match arg {
                Arg::Address(0) => Ok(()),
                Arg::Address(address) => blocks.check(&launch.kernel, *address, 0),
                _ => Ok(()),
            }),
            Call::Matmul(p) => matmul::check(p, blocks),
            Call::Convolve(p) => convolve::check(p, blocks),
            Call::Begin { .. } | Call::End { .. } => Ok(()),
        }
    }

    /// Does the work.
    pub(crate) fn run(&self, blocks: &mut Blocks, launches: &mut Launches) -> Result<()> {
        self.check(blocks)?;
        match self {
            Call::Upload { to, bytes } => {
                blocks.write("upload", *to, bytes.len())?.copy_from_slice(bytes);
            }
            Call::Copy { to, from, bytes } => {
                let source = blocks.read("copy", *from, *bytes)?.to_vec();
                blocks.write("copy", *to, *bytes)?.copy_from_slice(&source);
            }
            Call::Zero { to, bytes } => blocks.write("zero", *to, *bytes)?.fill(0),
            Call::Launch(p) => {
                let before = launches.count(p.module, &p.kernel);
                let launch = Launch {
                    module: p.module,
                    kernel: &p.kernel,
                    grid: p.grid,
                    block: p.block,
                    shared: p.shared,
                    args: &p.args,
                };
                p.found.run(&launch, before % 2 == 1)?;
            }
            Call::Matmul(p) => {
                launches.matmuls += 1;
                matmul::run(p, blocks)?;
            }
            Call::Convolve(p) => {
                launches.convolutions += 1;
                convolve::run(p, blocks)?;
            }
            Call::Begin { address, bytes } => blocks.begin(*address, *bytes)?,
            Call::End { address, bytes } => blocks.end(*address, *bytes)?,
        }
        Ok(())
    }
}
