//! Kernels that move elements.

use engine::{DType, Device, Ids};

use crate::reference::*;

fn counted(shape: &[usize], dtype: DType) -> engine::Tensor {
    let data: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 251) as f32).collect();
    tensor(shape, &data, dtype)
}

#[test]
fn joining_and_cutting_the_last_axis_are_inverse() {
    for dtype in [DType::F32, DType::BF16] {
        let (a, b) = (counted(&[2, 3, 5], dtype), counted(&[2, 3, 2], dtype));
        let joined = backend().concat_last(&a, &b).unwrap();
        assert_eq!(joined.shape(), [2, 3, 7]);
        assert_eq!(values(&joined)[7..14], [5., 6., 7., 8., 9., 2., 3.]);
        let (left, right) = backend().split_last(&joined, 5).unwrap();
        assert_eq!((values(&left), values(&right)), (values(&a), values(&b)));
        assert_eq!((left.shape(), right.shape()), (a.shape(), b.shape()));
    }
    assert!(
        backend()
            .concat_last(&counted(&[2, 3], DType::F32), &counted(&[3, 3], DType::F32))
            .is_err()
    );
    assert!(backend().split_last(&counted(&[2, 3], DType::F32), 4).is_err());
}

#[test]
fn large_joins_keep_every_row() {
    let (a, b) = (random(&[4099, 7], 1), random(&[4099, 3], 2));
    let (left, right) = backend().split_last(&backend().concat_last(&a, &b).unwrap(), 7).unwrap();
    assert_eq!((values(&left), values(&right)), (values(&a), values(&b)));
}

#[test]
fn upsampling_repeats_pixels_and_its_gradient_sums_them() {
    for dtype in [DType::F32, DType::BF16] {
        let x = counted(&[2, 2, 3, 2], dtype);
        let up = backend().upsample2x(&x).unwrap();
        assert_eq!(up.shape(), [2, 4, 6, 2]);
        let (small, large) = (values(&x), values(&up));
        for (i, got) in large.iter().enumerate() {
            let (c, w, h, b) = (i % 2, i / 2 % 6, i / 12 % 4, i / 48);
            assert_eq!(*got, small[((b * 2 + h / 2) * 3 + w / 2) * 2 + c]);
        }
        let back = backend().upsample2x_backward(&up).unwrap();
        let want: Vec<f32> = small.iter().map(|x| 4. * x).collect();
        assert_eq!((back.shape(), values(&back)), (x.shape(), want));
    }
    assert!(backend().upsample2x(&counted(&[2, 2, 2], DType::F32)).is_err());
    assert!(backend().upsample2x_backward(&counted(&[1, 3, 2, 1], DType::F32)).is_err());
}

#[test]
fn rows_are_looked_up_and_an_unknown_id_is_named() {
    let table = counted(&[4, 3], DType::BF16);
    let ids = |ids: &[u32]| Ids::new(Device::Cpu, ids).unwrap();
    let rows = backend().embedding(&table, &ids(&[3, 0, 3])).unwrap();
    assert_eq!(values(&rows), [9., 10., 11., 0., 1., 2., 9., 10., 11.]);
    let message = backend().embedding(&table, &ids(&[1, 4])).unwrap_err().to_string();
    assert!(message.contains("id 4") && message.contains("4 rows"), "{message}");
    assert!(backend().embedding(&counted(&[4], DType::F32), &ids(&[0])).is_err());
}

#[test]
fn rows_are_put_behind_each_other() {
    let (a, b) = (counted(&[2, 2, 3], DType::F32), counted(&[1, 3], DType::F32));
    let both = backend().concat_rows(&a, &b).unwrap();
    assert_eq!(both.shape(), [5, 3]);
    assert_eq!(values(&both)[9..], [9., 10., 11., 0., 1., 2.]);
    assert!(backend().concat_rows(&a, &counted(&[1, 2], DType::F32)).is_err());
}
