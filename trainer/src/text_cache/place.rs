//! The folder through which the ranks of a host share what the text encoders said: written by the first
//! of them, mapped by all, gone before the training begins.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use collectives::{Comm, Env};
use formats::OwnedTensor;
use formats::safetensors_file::{SafetensorsFile, write_safetensors};

use super::share::{Said, exchange};
use crate::encoded::{Form, ROWS};

/// A folder through which the ranks of a host share captions; its files stay mapped when it is gone.
pub struct Place {
    folder: PathBuf,
    is_first: bool,
}

impl Place {
    /// The first rank of each host names the folder for those of its host, and makes it.
    pub fn agree(comm: &Comm, env: &Env) -> Result<Self> {
        let own = std::env::temp_dir().join(format!("lorarun-text-{}", std::process::id()));
        let is_first = env.local_rank == 0;
        let made = match is_first {
            true => std::fs::create_dir_all(&own)
                .with_context(|| format!("cannot make the folder: {}", own.display())),
            false => Ok(()),
        };
        let said = Said { folder: own.display().to_string(), ..Said::outcome(&made) };
        let mut all = exchange(comm, said, &[])?;
        made?;
        let folder = PathBuf::from(all.swap_remove(env.rank - env.local_rank).0.folder);
        Ok(Self { folder, is_first })
    }

    fn path(&self, round: usize) -> PathBuf {
        self.folder.join(format!("{round}.safetensors"))
    }

    /// Keeps the captions of a round, on the first rank of the host.
    pub fn keep(&self, round: usize, bytes: Vec<u8>, form: &Form) -> Result<()> {
        if !self.is_first {
            return Ok(());
        }
        let shape = vec![bytes.len() / form.dtype.size()];
        let tensor = OwnedTensor { dtype: form.dtype, shape, data: bytes };
        let tensors = BTreeMap::from([(ROWS.to_owned(), tensor)]);
        Ok(formats::atomic::write_atomic(&self.path(round), |writer| {
            write_safetensors(writer, &tensors, None)
        })?)
    }

    /// Maps the captions of a round.
    pub fn open(&self, round: usize) -> Result<Arc<SafetensorsFile>> {
        Ok(Arc::new(SafetensorsFile::open(&self.path(round))?))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Also where the run ends with an error. A folder that stays does no harm.
        if self.is_first {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}
