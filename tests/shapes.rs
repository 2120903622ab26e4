//! Reads a generated picture back: which shape, which colour, on which background, by plain arithmetic.
//!
//! The same judge as `examples/tiny-sd/shapes.py`: every pixel goes to the nearest colour of a palette,
//! the border gives the background, and the outline of what is not background is compared with each
//! shape's by intersection over union.

/// Object colours; a texture darkens them to `SHADE`.
const COLOURS: [(&str, [f32; 3]); 6] = [
    ("red", [220., 40., 40.]),
    ("green", [40., 170., 60.]),
    ("blue", [50., 80., 220.]),
    ("yellow", [240., 210., 50.]),
    ("purple", [150., 60., 190.]),
    ("orange", [240., 130., 30.]),
];
const BACKGROUNDS: [(&str, [f32; 3]); 4] = [
    ("white", [245., 245., 245.]),
    ("black", [20., 20., 20.]),
    ("gray", [130., 130., 130.]),
    ("pink", [250., 190., 200.]),
];
/// The base model's shapes, then the one that the LoRA teaches.
pub const SHAPES: [&str; 6] = ["circle", "square", "triangle", "cross", "diamond", "ring"];
const SHADE: f32 = 0.7;
/// Outlines are compared on a square of so many cells a side.
const CELLS: usize = 24;
/// Least overlap of two outlines for a shape to count as seen.
const OVERLAP: f32 = 0.75;

/// What a picture shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub shape: Option<&'static str>,
    pub colour: Option<&'static str>,
    pub background: &'static str,
}

/// Signed distance (roughly) from the outline of a shape of radius 1 at the origin; `y` grows downwards.
fn distance(shape: &str, x: f32, y: f32) -> f32 {
    let (ax, ay, radius) = (x.abs(), y.abs(), x.hypot(y));
    match shape {
        "circle" => radius - 0.95,
        "square" => ax.max(ay) - 0.85,
        "diamond" => (ax + ay - 1.1) * std::f32::consts::FRAC_1_SQRT_2,
        "triangle" => (ax * 0.894 - (y + 1.) * 0.447).max(y - 0.85),
        "cross" => (ax - 0.95).max(ay - 0.32).min((ax - 0.32).max(ay - 0.95)),
        "ring" => (radius - 0.72).abs() - 0.23,
        _ => panic!("no shape of this name: {shape}"),
    }
}

/// Reads an RGB picture of `width` columns.
pub fn judge(rgb: &[u8], width: usize) -> Seen {
    let height = rgb.len() / width / 3;
    let shades = COLOURS.iter().flat_map(|(_, rgb)| [*rgb, rgb.map(|c| c * SHADE)]);
    let palette: Vec<[f32; 3]> = shades.chain(BACKGROUNDS.map(|(_, rgb)| rgb)).collect();
    let shades = 2 * COLOURS.len();
    let apart = |pixel: &[u8], colour: &[f32; 3]| -> f32 {
        pixel.iter().zip(colour).map(|(a, b)| (f32::from(*a) - b).powi(2)).sum()
    };
    let nearest: Vec<usize> = rgb
        .chunks(3)
        .map(|pixel| smallest(palette.iter().map(|colour| apart(pixel, colour))))
        .collect();

    let mut border = vec![0_usize; palette.len()];
    for (at, index) in nearest.iter().enumerate() {
        let (x, y) = (at % width, at / width);
        let sides = [x < 4, x + 4 >= width, y < 4, y + 4 >= height];
        border[*index] += sides.iter().filter(|on| **on).count();
    }
    let back = shades + smallest(border[shades..].iter().map(|count| -(*count as f32)));
    let background = BACKGROUNDS[back - shades].0;
    let far: Vec<bool> =
        rgb.chunks(3).map(|pixel| apart(pixel, &palette[back]) > 60. * 60.).collect();
    if far.iter().filter(|far| **far).count() < 64 {
        return Seen { shape: None, colour: None, background };
    }
    let mut inside = [0_usize; COLOURS.len()];
    for (index, _) in nearest.iter().zip(&far).filter(|(index, far)| **far && **index < shades) {
        inside[index / 2] += 1;
    }
    let colour = Some(COLOURS[smallest(inside.iter().map(|count| -(*count as f32)))].0);
    Seen { shape: shape(&far, width, height), colour, background }
}

/// The shape whose outline fits best, if it fits.
fn shape(far: &[bool], width: usize, height: usize) -> Option<&'static str> {
    // Rows and columns that hold more than a stray pixel.
    let rows: Vec<usize> =
        (0..height).filter(|y| (0..width).filter(|x| far[y * width + x]).count() >= 3).collect();
    let columns: Vec<usize> =
        (0..width).filter(|x| (0..height).filter(|y| far[y * width + x]).count() >= 3).collect();
    if rows.len() < 8 || columns.len() < 8 {
        return None;
    }
    let have = cells(&rows, &columns, |x, y| far[y * width + x]);
    let fit = |name: &&'static str| {
        let (mut both, mut either) = (0_usize, 0_usize);
        for (have, want) in have.iter().zip(outline(name)) {
            both += usize::from(*have && want);
            either += usize::from(*have || want);
        }
        both as f32 / either as f32
    };
    let best = SHAPES.iter().max_by(|a, b| fit(a).total_cmp(&fit(b)))?;
    (fit(best) >= OVERLAP).then_some(best)
}

/// A shape's cells, its bounding box scaled to the square.
fn outline(shape: &str) -> Vec<bool> {
    const FINE: usize = 480;
    let at = |pixel: usize| (pixel as f32 + 0.5) / FINE as f32 * 2.4 - 1.2;
    let inside = |x: usize, y: usize| distance(shape, at(x), at(y)) <= 0.;
    let rows: Vec<usize> = (0..FINE).filter(|y| (0..FINE).any(|x| inside(x, *y))).collect();
    let columns: Vec<usize> = (0..FINE).filter(|x| (0..FINE).any(|y| inside(*x, y))).collect();
    cells(&rows, &columns, inside)
}

/// Samples the box from the first to the last of `rows` and `columns` at the middle of each cell.
fn cells(rows: &[usize], columns: &[usize], inside: impl Fn(usize, usize) -> bool) -> Vec<bool> {
    let middle = |side: &[usize], cell: usize| {
        let (first, last) = (side[0], side[side.len() - 1] + 1);
        first + ((cell as f32 + 0.5) * (last - first) as f32 / CELLS as f32) as usize
    };
    let squares = (0..CELLS).flat_map(|y| (0..CELLS).map(move |x| (x, y)));
    squares.map(|(x, y)| inside(middle(columns, x), middle(rows, y))).collect()
}

/// Place of the first smallest number.
fn smallest(numbers: impl Iterator<Item = f32>) -> usize {
    numbers.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(place, _)| place)
}

#[test]
fn the_judge_sees_what_was_drawn_and_nothing_where_nothing_is() {
    const SIDE: usize = 64;
    let mut seen = Vec::new();
    for (number, shape_name) in SHAPES.iter().enumerate() {
        let (colour, front) = COLOURS[number];
        let (background, back) = BACKGROUNDS[number % 4];
        let (cx, cy) = ([-0.3, 0., 0.25][number % 3], [0.2, -0.2][number % 2]);
        let mut rgb = Vec::new();
        for at in 0..SIDE * SIDE {
            let place = |pixel: usize| (pixel as f32 + 0.5) / SIDE as f32 * 2. - 1.;
            let (x, y) = ((place(at % SIDE) - cx) / 0.5, (place(at / SIDE) - cy) / 0.5);
            let striped = if (at / 3) % 2 == 0 { 1. } else { SHADE };
            let on = distance(shape_name, x, y) <= 0.;
            rgb.extend(if on { front.map(|c| (c * striped) as u8) } else { back.map(|c| c as u8) });
        }
        seen.push((
            judge(&rgb, SIDE),
            Seen { shape: Some(shape_name), colour: Some(colour), background },
        ));
    }
    for (judged, drawn) in seen {
        assert_eq!(judged, drawn);
    }
    let empty: Vec<u8> = [130, 130, 130].repeat(SIDE * SIDE);
    assert_eq!(judge(&empty, SIDE), Seen { shape: None, colour: None, background: "gray" });
    // Half of it gone, a circle is no circle.
    let half: Vec<u8> = (0..SIDE * SIDE)
        .flat_map(|at| {
            let place = |pixel: usize| (pixel as f32 + 0.5) / SIDE as f32 * 4. - 2.;
            let (x, y) = (place(at % SIDE), place(at / SIDE));
            let on = distance("circle", x, y) <= 0. && (y < -0.3 || (x < 0. && y > 0.3));
            if on { [220, 40, 40] } else { [20, 20, 20] }
        })
        .collect();
    assert_eq!(judge(&half, SIDE).shape, None);
}
