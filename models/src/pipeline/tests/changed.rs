//! Pictures that start from others, in one stage and in two, in batches and in tiles.

use std::sync::Arc;

use super::*;
use crate::Tiling;
use crate::sampler::{Prediction, SamplerKind};

fn small() -> Request {
    Request {
        prompt: "two blue birds".into(),
        width: 64,
        height: 64,
        seed: 1,
        sampler: SamplerKind::Euler,
        options: SamplerOptions::new(4),
        guidance_scale: 3.,
        ..Request::default()
    }
}

/// Colours that change from left to right, from top to bottom.
fn ramp(width: usize, height: usize) -> Picture {
    let at = |i: usize| {
        let (x, y) = (i % width, i / width);
        [x as f32 / width as f32, y as f32 / height as f32, 0.5]
    };
    Picture { width, height, rgb: (0..width * height).flat_map(at).collect() }
}

#[test]
fn changed_pictures_are_those_of_diffusers() {
    let pipeline = load();
    let file =
        open_tensor_file(&data("generate/changed_pictures.safetensors")).expect("the pictures");
    let cases: serde_json::Value =
        serde_json::from_str(&file.metadata()["cases"]).expect("the cases as JSON");
    let image = file.view("image").expect("the given picture");
    let (height, width) = (image.shape[0], image.shape[1]);
    let image = Picture::from_rgb8(width, height, &image.data).expect("a picture");
    let mask = file.view("mask").expect("the mask");
    let gray: Vec<u8> = mask.data.iter().flat_map(|x| [*x; 3]).collect();
    let mask = Arc::new(Mask::of(&Picture::from_rgb8(width, height, &gray).expect("a mask")));
    let image = Arc::new(image);
    for (index, case) in cases.as_array().expect("a list").iter().enumerate() {
        let number = |key: &str| case[key].as_f64().expect("a number");
        let masked = case["masked"].as_bool().expect("a flag");
        let sampler = case["sampler"].as_str().expect("a text");
        let request = Request {
            prompt: "a green tree".into(),
            negative_prompt: "blurry".into(),
            width,
            height,
            seed: number("seed") as u64,
            sampler: sampler.parse().expect("a sampler"),
            options: SamplerOptions::new(number("steps") as usize),
            guidance_scale: number("scale") as f32,
            image: Some(image.clone()),
            strength: number("strength"),
            mask: masked.then(|| mask.clone()),
            ..Request::default()
        };
        let picture = make(&pipeline, &request).expect("a picture");
        let expected = file.view(&format!("picture.{index}")).expect("the picture").to_f32();
        let mean = mean_apart(&picture.rgb, &expected);
        eprintln!("{sampler}, masked {masked}: mean difference {mean:.2e}");
        assert!(mean <= CLOSE, "{sampler}, masked {masked}: mean difference {mean}");
    }
}

/// What is made together is what is made alone but for rounding, in the order of the requests.
#[test]
fn a_batch_is_its_pictures_one_by_one() {
    let pipeline = load();
    let wide = Request { width: 128, ..small() };
    let long = Request { prompt: "word ".repeat(80), most_chunks: 2, ..small() };
    let given = Request { image: Some(Arc::new(ramp(80, 50))), seed: 9, ..small() };
    let requests = [
        small(),
        wide,
        Request { seed: 2, ..small() },
        long,
        given.clone(),
        Request { seed: 8, ..given },
    ];
    let mut last = None;
    let pictures = pipeline
        .generate_batch(&requests, &mut |progress| {
            assert_eq!(progress.done, last.map_or(0, |last: Progress| last.done) + 1);
            last = Some(progress);
            ControlFlow::Continue(())
        })
        .expect("pictures");
    // Four groups: three of 4 steps, and one of int(0.8 * 4).
    assert_eq!(last, Some(Progress { done: 15, of: 15 }));
    assert_eq!(pictures.len(), requests.len());
    for (picture, request) in pictures.iter().zip(&requests) {
        assert_eq!((picture.width, picture.height), (request.width, request.height));
        let alone = make(&pipeline, request).expect("a picture");
        let mean = mean_apart(&picture.rgb, &alone.rgb);
        assert!(mean < 1e-5, "{mean:e}");
    }
    assert!(mean_apart(&pictures[0].rgb, &pictures[2].rgb) > 0.01);
}

/// In latents: the VAE looks at the whole of them for every pixel.
#[test]
fn a_mask_keeps_what_is_black() {
    let pipeline = load();
    let reader = TextReader {
        tokenizers: &pipeline.tokenizers,
        encoders: &pipeline.text_encoders,
        params: None,
        clip_skip: None,
        most_chunks: 1,
    };
    let prompt = &reader.read(&["a green tree"]).expect("a prompt")[0];
    let start: Vec<f32> = (0..8 * 8 * 4).map(|i| (i as f32 / 7.).sin()).collect();
    let mask: Vec<f32> = (0..8 * 8).map(|i| if i % 8 < 4 { 1. } else { 0. }).collect();
    let how = Denoising {
        size: [8, 8],
        sampler: SamplerKind::EulerAncestral,
        options: SamplerOptions { strength: Some(1.), ..SamplerOptions::new(2) },
        guidance_scale: 1.,
        sizes: None,
    };
    let subject = |mask| Subject {
        prompt,
        negative: prompt,
        noise: TorchNoise::new(1),
        start: Some(start.as_slice()),
        mask,
    };
    // One with a mask, one without, in one batch.
    let mut subjects = [subject(Some(mask.as_slice())), subject(None)];
    let predictor = Predictor { unet: &pipeline.unet, params: None };
    let mut watch = |_| ControlFlow::Continue(());
    let latents = predictor.denoise(&mut subjects, &how, &mut watch).expect("latents");
    let (masked, free) = latents.split_at(start.len());
    for (i, ((new, old), free)) in masked.iter().zip(&start).zip(free).enumerate() {
        let is_black = mask[i / 4] == 0.;
        assert_eq!(new == old, is_black, "{i}: {new} of {old}");
        assert_ne!(free, old, "{i}");
    }
}

#[test]
fn two_stages_are_two_pictures() {
    let pipeline = load();
    let highres = HighresFix { steps: 3, strength: Some(1.), ..HighresFix::default() };
    let request =
        Request { width: 128, height: 136, highres_fix: Some(highres), strength: 0.5, ..small() };
    let first = Request { options: SamplerOptions::new(3), ..small() };
    let first = make(&pipeline, &first).expect("the first stage");
    // 68 rows are rounded down to 64.
    let second = Request { highres_fix: None, image: Some(Arc::new(first)), ..request.clone() };
    let second = make(&pipeline, &Request { seed: request.seed + 1, ..second }).expect("a picture");
    let mut made = Vec::new();
    for latents in [false, true] {
        let fix = Some(HighresFix { latents, ..highres });
        let request = Request { highres_fix: fix, ..request.clone() };
        let mut last = Progress { done: 0, of: 0 };
        let mut watch = |progress| {
            last = progress;
            ControlFlow::Continue(())
        };
        made.push(pipeline.generate(&request, &mut watch).expect("a picture"));
        assert_eq!(last, Progress { done: 5, of: 5 });
    }
    assert_eq!(made[0], second);
    assert_eq!((made[1].width, made[1].height), (128, 136));
    assert!(mean_apart(&made[0].rgb, &made[1].rgb) > 0.01);
    let scale = |scale| {
        let fix = Some(HighresFix { scale, ..highres });
        make(&pipeline, &Request { highres_fix: fix, ..request.clone() }).expect_err("no stage")
    };
    for bad in [0., 0.2, 1., 2., f64::NAN, -1.] {
        assert!(matches!(scale(bad), PipelineError::HighresScale { .. }), "{bad}");
    }
}

/// Normalisations see a tile in place of the picture: colours move a little, with random weights as here
/// more than with trained ones; seams do not show. A tile in a wrong place would differ by 0.1 and more.
#[test]
fn tiles_are_close_to_the_whole() {
    let mut pipeline = load();
    let image = ramp(576, 64);
    let request = Request { width: 576, image: Some(Arc::new(image)), strength: 0.5, ..small() };
    let request = Request { options: SamplerOptions::new(2), ..request };
    pipeline.tiling = Tiling::Never;
    let whole = make(&pipeline, &request).expect("a picture");
    pipeline.tiling = Tiling::Always;
    let tiled = make(&pipeline, &request).expect("a picture");
    let mean = mean_apart(&whole.rgb, &tiled.rgb);
    // A seam would be a step from one column to the next that the whole picture does not have.
    let step = |picture: &Picture| {
        let column = |x: usize| {
            let rows = picture.rgb.chunks(576 * 3);
            rows.map(|row| row[x * 3..][..3].iter().sum::<f32>()).sum::<f32>() / 192.
        };
        (1..576).map(|x| (column(x) - column(x - 1)).abs()).fold(0., f32::max)
    };
    let steps = [step(&tiled), step(&whole)];
    eprintln!("tiles: mean difference {mean:.2e}, from column to column {steps:.3?}");
    assert!(mean > 0. && mean < 0.04, "{mean}");
    assert!(steps[0] < 1.25 * steps[1], "{steps:?}");
    // A picture within a tile is not touched.
    pipeline.tiling = Tiling::Always;
    let one = make(&pipeline, &small()).expect("a picture");
    pipeline.tiling = Tiling::Never;
    assert_eq!(one, make(&pipeline, &small()).expect("a picture"));
}

#[test]
fn what_the_model_predicts_is_the_models() {
    let model = data("parity/model").display().to_string();
    let options = PipelineOptions { v_parameterization: Some(true), ..PipelineOptions::default() };
    let velocity = Pipeline::load(&model, &options).expect("the model");
    assert_eq!(velocity.prediction, Prediction::Velocity);
    let noise = load();
    assert_eq!(noise.prediction, Prediction::Epsilon);
    let of = |pipeline: &Pipeline, prediction| {
        let options = SamplerOptions { prediction, ..SamplerOptions::new(4) };
        make(pipeline, &Request { options, ..small() }).expect("a picture")
    };
    let by_model = of(&velocity, Prediction::Epsilon);
    assert_eq!(by_model, of(&noise, Prediction::Velocity));
    assert_ne!(by_model, of(&noise, Prediction::Epsilon));
    let options = PipelineOptions { zero_terminal_snr: Some(true), ..PipelineOptions::default() };
    let zero = Pipeline::load(&model, &options).expect("the model");
    let error = make(&zero, &Request { sampler: SamplerKind::Lms, ..small() });
    assert!(matches!(error, Err(PipelineError::Sampler(_))));
}

#[test]
fn impossible_requests_are_refused() {
    let pipeline = load();
    let refused = |request: Request| make(&pipeline, &request).expect_err("it cannot be made");
    let odd = refused(Request { width: 100, ..small() });
    assert!(odd.to_string().contains("multiples of 8"), "{odd}");
    let mask = Arc::new(Mask::of(&ramp(8, 8)));
    let alone = refused(Request { mask: Some(mask), ..small() });
    assert!(matches!(alone, PipelineError::MaskAlone), "{alone}");
    let image = Some(Arc::new(ramp(8, 8)));
    let strength = refused(Request { image, strength: 0.1, ..small() });
    assert!(matches!(strength, PipelineError::Sampler(_)), "{strength}");
    let pixels = Picture::from_rgb8(2, 2, &[0; 11]).expect_err("eleven numbers");
    assert!(pixels.to_string().contains("2x2"), "{pixels}");
    let mut calls = 0;
    let stopped = pipeline.generate(&small(), &mut |_| {
        calls += 1;
        ControlFlow::Break(())
    });
    assert!(matches!(stopped, Err(PipelineError::Stopped)));
    assert_eq!(calls, 1);
}
