//! Captured work is noted, not done, and done by each replay.

use engine::cuda::driver::{Arg, Stream};

use crate::trial::{download_f32, driver, launch, upload_f32};

#[test]
fn a_graph_does_its_work_when_replayed() {
    let driver = driver();
    let x = upload_f32(driver, &[1.; 32]);
    let (sums, maxima) = (upload_f32(driver, &[0.; 32]), upload_f32(driver, &[0.; 32]));
    driver.begin_capture().unwrap();
    launch(driver, "reduce_f32", (1, 32), &[sums, maxima, x].map(Arg::Address)).unwrap();
    driver.copy(Stream::Compute, x, sums, 128).unwrap();
    // Uploads are kept with the graph.
    driver.upload(Stream::Compute, x, &7_f32.to_le_bytes()).unwrap();
    let graph = driver.end_capture().unwrap();
    assert_eq!(download_f32(driver, sums, 1), [0.]);
    driver.replay(graph).unwrap();
    assert_eq!(download_f32(driver, x, 2), [7., 32.]);
    driver.replay(graph).unwrap();
    assert_eq!(download_f32(driver, sums, 1), [7. + 31. * 32.]);
    driver.drop_graph(graph);
    assert!(driver.replay(graph).is_err());
}

#[test]
fn the_host_cannot_wait_within_a_capture() {
    let driver = driver();
    let x = upload_f32(driver, &[1.; 4]);
    driver.begin_capture().unwrap();
    assert!(driver.download(Stream::Compute, &mut [0; 4], x).is_err());
    assert!(driver.end_capture().unwrap_err().to_string().contains("download"));
    driver.begin_capture().unwrap();
    assert!(driver.begin_capture().is_err());
    assert!(driver.synchronize(Stream::Compute).is_err());
    assert!(driver.end_capture().is_err());
    assert!(driver.end_capture().is_err());
    assert_eq!(download_f32(driver, x, 1), [1.]);
}

#[test]
fn other_streams_are_captured_once_they_wait() {
    let driver = driver();
    let x = upload_f32(driver, &[1.; 4]);
    driver.begin_capture().unwrap();
    // Not in the capture: done at once.
    driver.upload(Stream::Copy, x, &5_f32.to_le_bytes()).unwrap();
    assert!(driver.download(Stream::Copy, &mut [0; 4], x).is_ok());
    driver.order(Stream::Compute, Stream::Reduce).unwrap();
    driver.zero(Stream::Reduce, x, 4).unwrap();
    driver.order(Stream::Reduce, Stream::Compute).unwrap();
    let graph = driver.end_capture().unwrap();
    assert_eq!(download_f32(driver, x, 1), [5.]);
    driver.replay(graph).unwrap();
    assert_eq!(download_f32(driver, x, 1), [0.]);
    // A stream that nothing waits for is left over, one from outside cannot be waited for.
    driver.begin_capture().unwrap();
    driver.order(Stream::Compute, Stream::Reduce).unwrap();
    assert!(driver.end_capture().unwrap_err().to_string().contains("Reduce"));
    driver.begin_capture().unwrap();
    driver.order(Stream::Copy, Stream::Compute).unwrap();
    assert!(driver.end_capture().unwrap_err().to_string().contains("Copy"));
}
