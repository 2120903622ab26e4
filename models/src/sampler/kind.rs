//! The names of the samplers: those of sd-scripts' `--sampler` and the labels of WebUI.

use std::fmt;
use std::str::FromStr;

use super::error::SamplerError;

/// A sampler. The first name of each is the one that is written, the others are read as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// Deterministic DDIM (Song et al., arXiv:2010.02502).
    Ddim,
    /// The ancestral chain of training (Ho et al., arXiv:2006.11239).
    Ddpm,
    /// Pseudo linear multistep with Runge-Kutta steps first (Liu et al., arXiv:2202.09778).
    Pndm,
    /// Linear multistep of order 4.
    Lms,
    /// Euler's method (Karras et al., arXiv:2206.00364, algorithm 2 without its correction).
    Euler,
    /// Euler's method that adds fresh noise after each step.
    EulerAncestral,
    /// Heun's method (Karras et al., algorithm 2): two evaluations per step.
    Heun,
    /// DPM-Solver-2 at the geometric middle of a step: two evaluations per step.
    Dpm2,
    /// The same with fresh noise after each step.
    Dpm2Ancestral,
    /// DPM-Solver, multistep of order 2 (Lu et al., arXiv:2206.00927).
    DpmSolver,
    /// DPM-Solver++ 2M (Lu et al., arXiv:2211.01095).
    DpmSolverPlus,
    /// DPM-Solver++ 2M of the stochastic equation.
    DpmSolverPlusSde,
    /// DPM-Solver++ 2S: single steps of order 1 and 2 in turn.
    DpmSingle,
    /// DPM-Solver++ 2S of the stochastic equation.
    DpmSingleSde,
    /// UniPC of order 2 with B2(h) (Zhao et al., arXiv:2302.04867).
    UniPc,
}

use SamplerKind::{
    Ddim, Ddpm, Dpm2, Dpm2Ancestral, DpmSingle, DpmSingleSde, DpmSolver, DpmSolverPlus,
    DpmSolverPlusSde, Euler, EulerAncestral, Heun, Lms, Pndm, UniPc,
};

/// What is known of a sampler by name.
struct Row {
    kind: SamplerKind,
    /// As sd-scripts writes it; ours where sd-scripts has none.
    name: &'static str,
    /// Other spellings, in the form of [`normalized`].
    aliases: &'static [&'static str],
    /// As WebUI writes it into pictures.
    webui: &'static str,
}

const fn row(
    kind: SamplerKind,
    name: &'static str,
    aliases: &'static [&'static str],
    webui: &'static str,
) -> Row {
    Row { kind, name, aliases, webui }
}

const ROWS: [Row; 15] = [
    row(Ddim, "ddim", &[], "DDIM"),
    row(Ddpm, "ddpm", &[], "DDPM"),
    row(Pndm, "pndm", &["plms"], "PLMS"),
    row(Lms, "lms", &["k_lms"], "LMS"),
    row(Euler, "euler", &["k_euler"], "Euler"),
    row(EulerAncestral, "euler_a", &["k_euler_a", "euler_ancestral"], "Euler a"),
    row(Heun, "heun", &["k_heun"], "Heun"),
    row(Dpm2, "dpm_2", &["k_dpm_2", "dpm2"], "DPM2"),
    row(Dpm2Ancestral, "dpm_2_a", &["k_dpm_2_a", "dpm2_a"], "DPM2 a"),
    row(DpmSolver, "dpmsolver", &[], "DPM-Solver 2M"),
    row(DpmSolverPlus, "dpmsolver++", &["dpm++_2m"], "DPM++ 2M"),
    row(DpmSolverPlusSde, "dpmsolver++_sde", &["sde_dpmsolver++", "dpm++_2m_sde"], "DPM++ 2M SDE"),
    row(DpmSingle, "dpmsingle", &["dpm++_2s"], "DPM++ 2S"),
    row(DpmSingleSde, "dpmsingle_sde", &["dpm++_2s_sde"], "DPM++ 2S SDE"),
    row(UniPc, "unipc", &[], "UniPC"),
];

/// Small letters, one `_` for a space or a hyphen.
fn normalized(name: &str) -> String {
    name.trim().to_lowercase().replace([' ', '-'], "_")
}

impl SamplerKind {
    /// All samplers, in the order of the help text.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.iter().map(|row| row.kind)
    }

    fn row(self) -> &'static Row {
        // Every kind has its row: the index is checked by `every_kind_is_its_own_row`.
        &ROWS[self as usize]
    }

    /// The name that `--sampler` takes.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The label in the parameters text of a picture.
    pub fn webui_label(self) -> &'static str {
        self.row().webui
    }

    /// Whether the sampler can space its noise levels as Karras et al. do.
    pub fn offers_karras(self) -> bool {
        !matches!(self, Ddim | Ddpm | Pndm | EulerAncestral)
    }

    /// Whether the sampler can start at pure noise (zero terminal SNR).
    pub fn offers_zero_terminal_snr(self) -> bool {
        matches!(
            self,
            Ddim | Ddpm
                | Euler
                | EulerAncestral
                | DpmSolver
                | DpmSolverPlus
                | DpmSolverPlusSde
                | UniPc
        )
    }

    /// Whether the timesteps can be spaced in another way than the sampler's own.
    pub fn offers_spacing(self) -> bool {
        !matches!(self, DpmSingle | DpmSingleSde)
    }

    /// Whether fresh noise is drawn while sampling.
    pub fn draws_noise(self) -> bool {
        matches!(self, Ddpm | EulerAncestral | Dpm2Ancestral | DpmSolverPlusSde | DpmSingleSde)
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SamplerKind {
    type Err = SamplerError;

    /// Reads sd-scripts' names and their `k_` forms, the names above and WebUI's labels.
    fn from_str(name: &str) -> Result<Self, SamplerError> {
        let wanted = normalized(name);
        let fits = |row: &&Row| {
            row.name == wanted
                || row.aliases.contains(&wanted.as_str())
                || normalized(row.webui) == wanted
        };
        if let Some(row) = ROWS.iter().find(fits) {
            return Ok(row.kind);
        }
        let nearest = ROWS
            .iter()
            .map(|row| (strsim::jaro_winkler(row.name, &wanted), row.name))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(likeness, _)| *likeness > 0.75);
        let hint = match nearest {
            Some((_, name)) => format!("did you mean `{name}`?"),
            None => {
                let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
                format!("the samplers are {}", names.join(", "))
            }
        };
        Err(SamplerError::Unknown { name: name.to_owned(), hint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_its_own_row() {
        for (index, row) in ROWS.iter().enumerate() {
            assert_eq!(row.kind as usize, index, "{}", row.name);
            for name in [row.name, row.webui].iter().chain(row.aliases) {
                assert_eq!(name.parse::<SamplerKind>().unwrap(), row.kind, "{name}");
            }
        }
        let mut names: Vec<String> = ROWS
            .iter()
            .flat_map(|r| r.aliases.iter().chain([&r.name]))
            .map(|n| normalized(n))
            .collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "two samplers share a name");
    }

    #[test]
    fn sd_scripts_names_are_read() {
        for name in [
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ] {
            let kind: SamplerKind = name.parse().unwrap();
            assert_eq!(kind.name(), name.trim_start_matches("k_"));
        }
        assert_eq!("dpmsolver++ SDE".parse::<SamplerKind>().unwrap(), DpmSolverPlusSde);
        assert_eq!("sde-dpmsolver++".parse::<SamplerKind>().unwrap(), DpmSolverPlusSde);
    }

    #[test]
    fn an_unknown_name_gets_a_suggestion() {
        let said = |name: &str| name.parse::<SamplerKind>().unwrap_err().to_string();
        assert_eq!(said("eular_a"), "unknown sampler: `eular_a`\nhint: did you mean `euler_a`?");
        assert_eq!(
            said("dpmsolver+"),
            "unknown sampler: `dpmsolver+`\nhint: did you mean `dpmsolver++`?"
        );
        assert!(said("xyz").contains("hint: the samplers are ddim, ddpm, pndm"), "{}", said("xyz"));
    }
}
