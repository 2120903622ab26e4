//! Do the cards of this machine reach each other by NCCL? A trial for `lorarun doctor`.

use anyhow::{Context, Result};
use collectives::nccl::{Site, check};
use engine::cuda::driver::Stream;
use engine::cuda::nvidia::{self, Library};
use engine::{DType, Device, Tensor};

/// Sums one number over opened cards and gives a line about it, with NCCL's version and the time.
pub fn sum_over(cards: &[Device]) -> Result<String> {
    let library = nvidia::find(Library::Nccl).map_err(engine::EngineError::from)?;
    let numbers = cards.iter().map(|card| number_of(*card)).collect::<Result<Vec<i32>>>()?;
    let site = |number: i32| {
        let index = numbers.iter().position(|other| *other == number);
        let device = index.map(|index| cards[index]).context("an unknown card")?;
        site_on(device)
    };
    let open = |number| site(number).map_err(|error| format!("{error:#}"));
    Ok(check(&library.path, &numbers, open)?)
}

/// The number by which CUDA knows a card.
pub fn number_of(device: Device) -> Result<i32> {
    let label = device.to_string();
    let number = label.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    number.with_context(|| format!("this is no card of CUDA's: {label}"))
}

/// A float on the card, whose context is current on this thread afterwards.
fn site_on(device: Device) -> Result<Site<'static>> {
    let driver = device.card().context("not a card")?.driver();
    let place = Tensor::zeros(device, &[1], DType::F32)?;
    driver.synchronize(Stream::Compute)?;
    let (address, stream) = (place.address("all-reduce")?, driver.raw_stream(Stream::Compute));
    let to = place.clone();
    Ok(Site {
        address,
        stream,
        write: Box::new(move |value| to.refill(&[value]).map_err(|error| error.to_string())),
        read: Box::new(move || {
            let values = place.to_vec_f32().map_err(|error| error.to_string())?;
            values.first().copied().ok_or_else(|| "nothing came back".to_owned())
        }),
    })
}
