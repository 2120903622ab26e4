//! Shapes of what goes element by element, is joined, cut or composed; checked once for all devices.

use crate::{EngineError, Result, Tensor};

/// Fails unless `a` and `b` have one shape and one type.
pub(crate) fn check_same(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        return Err(EngineError::shape(op, format!("{a:?} and {b:?}")));
    }
    Ok(())
}

/// Half of the last axis, and the shape with that half.
pub(crate) fn halved(op: &'static str, x: &Tensor) -> Result<(usize, Vec<usize>)> {
    match x.shape().split_last() {
        Some((last, head)) if last % 2 == 0 && *last > 0 => {
            Ok((last / 2, head.iter().copied().chain([last / 2]).collect()))
        }
        _ => Err(EngineError::shape(op, format!("{:?} has no even last axis", x.shape()))),
    }
}

/// [`halved`] of the input `x` of GEGLU, whose output's gradient is `dy`.
pub(crate) fn check_gated(op: &'static str, dy: &Tensor, x: &Tensor) -> Result<usize> {
    let (width, shape) = halved(op, x)?;
    if dy.shape() != shape || dy.dtype() != x.dtype() {
        return Err(EngineError::shape(op, format!("dy {dy:?}, x {x:?}")));
    }
    Ok(width)
}

/// Width of the rows of `x`, for each of which there is a factor.
pub(crate) fn check_factors(op: &'static str, x: &Tensor, factors: &Tensor) -> Result<usize> {
    if factors.len() != x.rows() {
        let detail = format!("factors {:?} for {:?}", factors.shape(), x.shape());
        return Err(EngineError::shape(op, detail));
    }
    Ok(x.last_dim().max(1))
}

/// Images, rows of each and their width in `[B,...,C]`.
pub(crate) fn images_of_rows(op: &'static str, x: &Tensor) -> Result<(usize, usize, usize)> {
    let &[batch, .., width] = x.shape() else {
        return Err(EngineError::shape(op, format!("{:?} has no two axes", x.shape())));
    };
    Ok((batch, x.len().checked_div(batch * width).unwrap_or(0), width))
}

/// Shape of `a` and `b` joined along the last axis.
pub(crate) fn joined_last(op: &'static str, a: &Tensor, b: &Tensor) -> Result<Vec<usize>> {
    let (Some((wa, head)), Some((wb, other))) = (a.shape().split_last(), b.shape().split_last())
    else {
        return Err(EngineError::shape(op, "a scalar has no last axis"));
    };
    if head != other || a.dtype() != b.dtype() {
        return Err(EngineError::shape(op, format!("{a:?} and {b:?}")));
    }
    Ok(head.iter().copied().chain([wa + wb]).collect())
}

/// Shapes of the first `at` elements of the last axis, and of the rest.
pub(crate) fn cut_last(op: &'static str, x: &Tensor, at: usize) -> Result<[Vec<usize>; 2]> {
    match x.shape().split_last() {
        Some((width, head)) if at <= *width => {
            Ok([at, width - at].map(|last| head.iter().copied().chain([last]).collect()))
        }
        _ => {
            let detail = format!("{:?} cannot be cut after {at} channels", x.shape());
            Err(EngineError::shape(op, detail))
        }
    }
}

/// Sizes of feature maps.
pub(crate) fn image_shape(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    match x.shape() {
        &[b, h, w, c] => Ok([b, h, w, c]),
        other => Err(EngineError::shape(op, format!("{other:?} is not [B,H,W,C]"))),
    }
}

/// Sizes of feature maps of which 2x2 pixels become one.
pub(crate) fn even_image_shape(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    let [b, h, w, c] = image_shape(op, x)?;
    if h % 2 != 0 || w % 2 != 0 {
        let detail = format!("{:?} has an odd height or width", x.shape());
        return Err(EngineError::shape(op, detail));
    }
    Ok([b, h, w, c])
}

/// Rows and columns of a table.
pub(crate) fn table_shape(op: &'static str, table: &Tensor) -> Result<[usize; 2]> {
    match table.shape() {
        &[rows, width] => Ok([rows, width]),
        other => Err(EngineError::shape(op, format!("the table is {other:?}, not [N,C]"))),
    }
}

/// Shape of the rows of `a` followed by those of `b`.
pub(crate) fn joined_rows(op: &'static str, a: &Tensor, b: &Tensor) -> Result<[usize; 2]> {
    if a.last_dim() != b.last_dim() || a.dtype() != b.dtype() {
        return Err(EngineError::shape(op, format!("{a:?} and {b:?}")));
    }
    Ok([a.rows() + b.rows(), a.last_dim()])
}

/// Sizes of a Kronecker product: `[a,b]` by `[c,window,d]`.
pub(crate) struct KroneckerSizes {
    pub a: usize,
    pub b: usize,
    pub c: usize,
    pub window: usize,
    pub d: usize,
}

impl KroneckerSizes {
    pub fn new(op: &'static str, first: &Tensor, second: &Tensor) -> Result<Self> {
        match (first.shape(), second.shape()) {
            (&[a, b], &[c, window, d]) if !first.is_empty() && !second.is_empty() => {
                Ok(Self { a, b, c, window, d })
            }
            (first, second) => {
                Err(EngineError::shape(op, format!("first {first:?}, second {second:?}")))
            }
        }
    }

    /// Of the product.
    pub fn shape(&self) -> [usize; 3] {
        [self.a * self.c, self.window, self.b * self.d]
    }

    /// Fails unless the product's gradient has its elements.
    pub fn check_gradient(&self, op: &'static str, dy: &Tensor) -> Result<()> {
        let shape = self.shape();
        if dy.len() != shape.iter().product::<usize>() {
            let detail = format!("dy is {:?}, the product {shape:?}", dy.shape());
            return Err(EngineError::shape(op, detail));
        }
        Ok(())
    }
}

/// Length of a row of `v` (outermost axis), for each of which there is a magnitude.
pub(crate) fn row_length(op: &'static str, v: &Tensor, magnitude: &Tensor) -> Result<usize> {
    let rows = v.shape().first().copied().unwrap_or(0);
    if rows == 0 || v.is_empty() || magnitude.len() != rows {
        let detail = format!("weight {:?}, magnitude {:?}", v.shape(), magnitude.shape());
        return Err(EngineError::shape(op, detail));
    }
    Ok(v.len() / rows)
}
