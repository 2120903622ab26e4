//! The ModelSpec of what tools make.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use formats::Family;
use formats::model_spec::{ModelSpec, OptionalSpec};

/// What is written to `save_to` now; the file's name is the title.
pub(crate) fn model_spec(
    save_to: &Path,
    family: Family,
    v_parameterization: bool,
    merged_from: Option<String>,
) -> ModelSpec {
    let title = save_to.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // A clock before 1970 gives 1970.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    ModelSpec {
        family,
        v_parameterization,
        title,
        resolution: None,
        timestamp: now.as_secs().cast_signed(),
        timestep_range: None,
        clip_skip: None,
        implementation_version: concat!("lorarun/", env!("CARGO_PKG_VERSION")).to_owned(),
        optional: OptionalSpec { merged_from, ..OptionalSpec::default() },
    }
}
