//! Draws small pictures of coloured shapes with captions, several aspect ratios, the same bytes every time.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use image::{ImageBuffer, Rgb, RgbImage};

type Color = (&'static str, [u8; 3]);

const RED: Color = ("red", [214, 57, 48]);
const ORANGE: Color = ("orange", [240, 140, 40]);
const YELLOW: Color = ("yellow", [247, 205, 70]);
const GREEN: Color = ("green", [74, 157, 84]);
const BLUE: Color = ("blue", [52, 98, 184]);
const PURPLE: Color = ("purple", [128, 78, 160]);
const WHITE: Color = ("white", [244, 241, 232]);
const NIGHT: Color = ("dark blue", [26, 34, 66]);
const SAND: Color = ("beige", [226, 208, 170]);
const SKY: Color = ("light blue", [166, 208, 232]);

/// What is drawn in the middle.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// A disc.
    Circle,
    /// A square with its sides along the picture's.
    Square,
    /// A triangle standing on its base.
    Triangle,
    /// A five-pointed star.
    Star,
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Shape::Circle => "circle",
            Shape::Square => "square",
            Shape::Triangle => "triangle",
            Shape::Star => "star",
        }
    }

    /// Corners of the polygon around the origin at radius 1; none for the circle.
    fn corners(self) -> Vec<(f64, f64)> {
        let ring = |count: usize, turn: f64, radius: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
            (0..count)
                .map(|i| {
                    let angle = (turn + i as f64 / count as f64) * std::f64::consts::TAU;
                    (angle.cos() * radius(i), angle.sin() * radius(i))
                })
                .collect()
        };
        match self {
            Shape::Circle => Vec::new(),
            Shape::Square => ring(4, 0.125, &|_| 1.0),
            Shape::Triangle => ring(3, 0.75, &|_| 1.0),
            Shape::Star => ring(10, 0.75, &|i| if i % 2 == 0 { 1.0 } else { 0.42 }),
        }
    }
}

/// One picture: what, in which colours, how large.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    width: u32,
    height: u32,
    shape: Shape,
    color: Color,
    background: Color,
}

const fn scene(size: (u32, u32), shape: Shape, color: Color, background: Color) -> Scene {
    Scene { width: size.0, height: size.1, shape, color, background }
}

/// The pictures of `tests/gpu`: four shapes, three sizes each or more, sides of 256 to 384 pixels.
pub const SCENES: [Scene; 12] = [
    scene((256, 256), Shape::Circle, RED, SKY),
    scene((320, 256), Shape::Square, BLUE, SAND),
    scene((256, 384), Shape::Triangle, GREEN, WHITE),
    scene((384, 256), Shape::Star, YELLOW, NIGHT),
    scene((256, 320), Shape::Circle, ORANGE, NIGHT),
    scene((256, 256), Shape::Square, PURPLE, WHITE),
    scene((384, 256), Shape::Triangle, RED, SAND),
    scene((256, 384), Shape::Star, WHITE, BLUE),
    scene((320, 256), Shape::Circle, GREEN, SAND),
    scene((256, 256), Shape::Star, ORANGE, PURPLE),
    scene((256, 320), Shape::Square, YELLOW, GREEN),
    scene((320, 320), Shape::Triangle, BLUE, SKY),
];

impl Scene {
    /// The caption in the form of tags, the trained word first.
    pub fn caption(&self) -> String {
        let article = if self.color.0.starts_with('o') { "an" } else { "a" };
        let (color, shape) = (self.color.0, self.shape.name());
        format!("sks shapes, {article} {color} {shape}, {} background", self.background.0)
    }

    fn draw(&self) -> RgbImage {
        let corners = self.shape.corners();
        let radius = f64::from(self.width.min(self.height)) * 0.36;
        let (center_x, center_y) = (f64::from(self.width) / 2.0, f64::from(self.height) / 2.0);
        ImageBuffer::from_fn(self.width, self.height, |x, y| {
            let shade = 1.0 - 0.18 * f64::from(y) / f64::from(self.height);
            let covered =
                coverage(&corners, radius, (f64::from(x) - center_x, f64::from(y) - center_y));
            // A shadow below and to the right keeps the shape apart from a background of nearly its colour.
            let offset =
                (f64::from(x) - center_x - radius * 0.1, f64::from(y) - center_y - radius * 0.1);
            let shadow = 1.0 - 0.25 * coverage(&corners, radius, offset);
            Rgb(std::array::from_fn(|channel| {
                let behind = f64::from(self.background.1[channel]) * shade * shadow;
                let front = f64::from(self.color.1[channel]);
                (behind + (front - behind) * covered).round() as u8
            }))
        })
    }
}

/// Share of a pixel inside the shape, from a grid of 4x4 points.
fn coverage(corners: &[(f64, f64)], radius: f64, pixel: (f64, f64)) -> f64 {
    let reach = radius + 2.0;
    if pixel.0.abs() > reach || pixel.1.abs() > reach {
        return 0.0;
    }
    let points = (0..16).map(|i| {
        let (dx, dy) = (f64::from(i % 4), f64::from(i / 4));
        ((pixel.0 + (dx + 0.5) / 4.0) / radius, (pixel.1 + (dy + 0.5) / 4.0) / radius)
    });
    points.filter(|&point| inside(corners, point)).count() as f64 / 16.0
}

/// Even-odd rule for a polygon; the unit disc if there are no corners.
fn inside(corners: &[(f64, f64)], (x, y): (f64, f64)) -> bool {
    if corners.is_empty() {
        return x * x + y * y <= 1.0;
    }
    let mut crossings = 0;
    for (i, &(ax, ay)) in corners.iter().enumerate() {
        let (bx, by) = corners[(i + 1) % corners.len()];
        if (ay > y) != (by > y) && x < ax + (y - ay) / (by - ay) * (bx - ax) {
            crossings += 1;
        }
    }
    crossings % 2 == 1
}

/// Writes `NN_shape.png` and `NN_shape.txt` for every scene.
pub fn draw_pictures(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder: {}", folder.display()))?;
    for (index, scene) in SCENES.iter().enumerate() {
        let stem = folder.join(format!("{:02}_{}", index + 1, scene.shape.name()));
        let (picture, caption) = (stem.with_extension("png"), stem.with_extension("txt"));
        scene
            .draw()
            .save(&picture)
            .with_context(|| format!("cannot write: {}", picture.display()))?;
        fs::write(&caption, scene.caption() + "\n")
            .with_context(|| format!("cannot write: {}", caption.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_fill_the_middle_and_leave_the_corners() {
        for scene in &SCENES {
            let picture = scene.draw();
            let middle = picture.get_pixel(scene.width / 2, scene.height / 2);
            assert_eq!(middle.0, scene.color.1, "{}", scene.caption());
            assert_eq!(picture.get_pixel(0, 0).0, scene.background.1, "{}", scene.caption());
        }
    }

    #[test]
    fn every_picture_gets_a_caption_of_the_same_stem() {
        let folder = tempfile::tempdir().unwrap();
        draw_pictures(folder.path()).unwrap();
        let mut stems: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().path().file_stem().unwrap().to_owned())
            .collect();
        stems.sort();
        assert_eq!(stems.len(), 24);
        assert!(stems.chunks(2).all(|pair| pair[0] == pair[1]));
    }
}
