//! Rotary frequencies from a configuration: plain, linear, YaRN, Llama 3 and NTK with a fixed alpha.
//!
//! Computed in the order and precision of the reference implementations (f32 powers, f64 for the
//! correction range), since position 200,000 amplifies a last-bit difference of a frequency.

use kernels::rope::Rotation;
use serde_json::Value;

use crate::config::Rope;
use crate::error::{Error, Result};
use crate::fields::Fields;

/// Most rotated values of a head; published models have up to 256.
const MAX_DIM: usize = 4096;

/// The rotation of one kind of layer, and what its scaling does to the softmax scale.
pub struct Scaled {
    /// The rotation.
    pub rope: Rope,
    /// YaRN's `mscale(factor, mscale_all_dim)`, 1 without. MLA multiplies its softmax scale by
    /// the square.
    pub mscale_all_dim: f64,
}

/// YaRN's `0.1 m ln(factor) + 1` (arXiv 2309.00071, equation 22 with DeepSeek's `m`).
fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// Reads `rope_theta`, `rope_scaling` (or `rope_parameters`, which newer files carry instead) for
/// `dim` rotated values.
///
/// # Errors
/// If a field is missing or impossible, or the kind of scaling is not supported.
pub fn read(fields: &Fields, dim: usize, rotation: Rotation, default_theta: f64) -> Result<Scaled> {
    let scaling = match fields.object("rope_parameters")? {
        Some(parameters) => {
            // Newer files hold everything in one object and may keep the old fields beside it.
            fields.ignore(&["rope_scaling", "rope_theta"]);
            Some(parameters)
        }
        None => fields.object("rope_scaling")?,
    };
    let theta_in_scaling = match &scaling {
        Some(scaling) => scaling.opt_number("rope_theta")?,
        None => None,
    };
    let theta = match theta_in_scaling {
        Some(theta) => theta,
        None => fields.opt_number("rope_theta")?.unwrap_or(default_theta),
    };
    if theta <= 1.0 || !dim.is_multiple_of(2) || dim == 0 || dim > MAX_DIM {
        let message = format!("theta {theta} over {dim} values cannot be rotated");
        return Err(Error::config(fields.path("rope_theta"), message));
    }
    let plain = |theta: f64, scale: f64| -> Vec<f32> {
        (0..dim / 2).map(|i| 1.0 / power(theta, i, dim) / scale as f32).collect()
    };
    let mut mscale_all_dim = 1.0;
    let (inv_freq, attention_scale) = match &scaling {
        None => (plain(theta, 1.0), 1.0),
        Some(scaling) => {
            let kind = scaling.opt_text("rope_type")?.or(scaling.opt_text("type")?).unwrap_or("default");
            // `type` beside `rope_type` repeats it; the partial factor was read by the architecture.
            scaling.ignore(&["type", "partial_rotary_factor"]);
            let result = match kind {
                "default" => (plain(theta, 1.0), 1.0),
                "linear" => (plain(theta, positive(scaling, "factor")?), 1.0),
                "yarn" | "deepseek_yarn" => {
                    let yarn = Yarn::read(scaling, fields.opt_number("max_position_embeddings")?)?;
                    mscale_all_dim = yarn.mscale_all_dim.map_or(1.0, |m| mscale(yarn.factor, m));
                    (yarn.frequencies(theta, dim), yarn.attention_scale() as f32)
                }
                "llama3" => (llama3(scaling, &plain(theta, 1.0))?, 1.0),
                // Tencent's files say "dynamic" and mean NTK with a fixed alpha: only the base moves.
                "dynamic" if scaling.opt_number("alpha")?.is_some_and(|alpha| alpha != 0.0) => {
                    let alpha = positive(scaling, "alpha")?;
                    scaling.only("factor", &[Value::from(1.0), Value::from(1)])?;
                    scaling.ignore(&["beta_fast", "beta_slow", "mscale", "mscale_all_dim"]);
                    let stretched = theta * alpha.powf(dim as f64 / (dim as f64 - 2.0));
                    (plain(stretched, 1.0), 1.0)
                }
                other => {
                    let message = format!(
                        "{other:?} is not supported (default, linear, yarn, llama3, dynamic with alpha are)"
                    );
                    return Err(Error::config(scaling.path("rope_type"), message));
                }
            };
            scaling.finish()?;
            result
        }
    };
    let squared = mscale_all_dim.powi(2) as f32;
    if !inv_freq.iter().chain([&attention_scale, &squared]).all(|value| value.is_finite()) {
        let field = scaling.map_or(fields.path("rope_theta"), |scaling| scaling.path("factor"));
        return Err(Error::config(field, "gives frequencies or scales that are not finite"));
    }
    Ok(Scaled { rope: Rope { dim, rotation, inv_freq, attention_scale }, mscale_all_dim })
}

/// `theta^(2i/dim)` as the references compute it: exponent and power in f32.
fn power(theta: f64, i: usize, dim: usize) -> f32 {
    (theta as f32).powf((2 * i) as f32 / dim as f32)
}

fn positive(scaling: &Fields, name: &str) -> Result<f64> {
    let value = scaling.number(name)?;
    if value <= 0.0 {
        return Err(Error::config(scaling.path(name), format!("{value} must be positive")));
    }
    Ok(value)
}

struct Yarn {
    factor: f64,
    original: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
}

impl Yarn {
    /// `longest` positions are the original ones where the scaling does not say.
    fn read(scaling: &Fields, longest: Option<f64>) -> Result<Self> {
        // 0 means "unset" in published files, as it does to the reference's truth test.
        let set = |name: &str| Ok::<_, Error>(scaling.opt_number(name)?.filter(|value| *value != 0.0));
        let original = match (scaling.value("original_max_position_embeddings"), longest) {
            (None, Some(longest)) => longest,
            _ => positive(scaling, "original_max_position_embeddings")?,
        };
        Ok(Self {
            factor: positive(scaling, "factor")?,
            original,
            beta_fast: set("beta_fast")?.unwrap_or(32.0),
            beta_slow: set("beta_slow")?.unwrap_or(1.0),
            truncate: scaling.flag_or("truncate", true)?,
            attention_factor: scaling.opt_number("attention_factor")?,
            mscale: set("mscale")?,
            mscale_all_dim: set("mscale_all_dim")?,
        })
    }

    /// What cos and sin are multiplied by.
    fn attention_scale(&self) -> f64 {
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(factor), ..) => factor,
            (None, Some(m), Some(all)) => mscale(self.factor, m) / mscale(self.factor, all),
            _ => mscale(self.factor, 1.0),
        }
    }

    /// Frequencies that turn often within the original context stay, those that turn less than
    /// `beta_slow` times are divided by `factor`, with a linear ramp between.
    fn frequencies(&self, theta: f64, dim: usize) -> Vec<f32> {
        let correction = |rotations: f64| {
            dim as f64 * (self.original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (correction(self.beta_fast), correction(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let mut high = high.min(dim as f64 - 1.0);
        if low == high {
            high += 0.001;
        }
        (0..dim / 2)
            .map(|i| {
                let power = power(theta, i, dim);
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                1.0 / (self.factor as f32 * power) * (1.0 - keep) + 1.0 / power * keep
            })
            .collect()
    }
}

fn llama3(scaling: &Fields, plain: &[f32]) -> Result<Vec<f32>> {
    let factor = positive(scaling, "factor")? as f32;
    let low = positive(scaling, "low_freq_factor")? as f32;
    let high = positive(scaling, "high_freq_factor")? as f32;
    let original = positive(scaling, "original_max_position_embeddings")? as f32;
    Ok(plain
        .iter()
        .map(|&frequency| {
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Golden inverse frequencies and scales of `models-maths.md` 1.3, at i = 12, 16, 19, 20, 31.
    #[test]
    fn yarn_matches_published_values() {
        let cases = [
            (5e4, 32.0, 1.0, [0.017293633, 0.004472136, 0.0016217599, 3.6140468e-05, 8.7644129e-07]),
            (5e4, 64.0, 1.0, [0.017293633, 0.004472136, 0.0016217599, 1.8070234e-05, 4.3822065e-07]),
            (5e4, 64.0, 32.0, [0.01161916, 0.0015372967, 0.00015837499, 1.8070234e-05, 4.3822065e-07]),
            (1e4, 40.0, 32.0, [0.02687936, 0.0055, 0.0013705136, 0.00079056942, 3.3338036e-06]),
        ];
        for (theta, factor, beta_fast, golden) in cases {
            let config = json!({"rope_theta": theta, "rope_scaling": {"type": "yarn", "factor": factor,
                "original_max_position_embeddings": 4096, "beta_fast": beta_fast, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 1.0}});
            let fields = Fields::new(&config, "").unwrap();
            let scaled = read(&fields, 64, Rotation::Interleaved, 1e4).unwrap();
            for (i, want) in [12, 16, 19, 20, 31].into_iter().zip(golden) {
                let got = f64::from(scaled.rope.inv_freq[i]);
                assert!((got / want - 1.0).abs() < 3e-6, "theta {theta} i {i}: {got} {want}");
            }
            assert_eq!(scaled.rope.attention_scale, 1.0);
            let scale = 192f64.powf(-0.5) * scaled.mscale_all_dim.powi(2);
            let golden_scale = [(32.0, 0.13086080), (64.0, 0.14467963), (40.0, 0.13523378)];
            let want = golden_scale.iter().find(|(f, _)| *f == factor).unwrap().1;
            assert!((scale - want).abs() < 1e-7, "{scale} {want}");
        }
    }

    #[test]
    fn gpt_oss_yarn_is_not_truncated_and_concentrates() {
        let config = json!({"rope_theta": 150000, "rope_scaling": {"rope_type": "yarn", "factor": 32.0,
            "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false}});
        let scaled = read(&Fields::new(&config, "").unwrap(), 64, Rotation::Half, 1e4).unwrap();
        assert!((scaled.rope.attention_scale - 1.3465736).abs() < 1e-6);
        let plain = |i: usize| 150000f64.powf(-2.0 * i as f64 / 64.0);
        let ratio = |i: usize| f64::from(scaled.rope.inv_freq[i]) / plain(i);
        assert!((ratio(8) - 1.0).abs() < 1e-5 && ratio(9) < 0.99, "{} {}", ratio(8), ratio(9));
        assert!((ratio(18) - 1.0 / 32.0).abs() < 1e-6);
    }

    #[test]
    fn an_unknown_scaling_is_an_error() {
        let config = json!({"rope_scaling": {"type": "longrope", "factor": 2.0}});
        let error = read(&Fields::new(&config, "").unwrap(), 64, Rotation::Half, 1e4).err().unwrap();
        assert!(error.to_string().contains("rope_scaling.rope_type"), "{error}");
    }
}
