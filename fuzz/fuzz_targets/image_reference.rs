//! Image references, and the search for their entries in a docker config.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::domain::{
    docker_config::parse::Config,
    matching::{ImageName, explain_config},
};
use regcred_fuzz::{first_line, limited};

fuzz_target!(|input: &[u8]| limited(|| {
    let (image, document) = first_line(input);
    let Ok(image) = str::from_utf8(image) else { return };
    let Ok(image) = ImageName::parse(image) else { return };
    assert_eq!(ImageName::parse(&image.to_string()).as_ref(), Ok(&image));
    if let Ok(config) = Config::parse(document) {
        assert_eq!(explain_config(&config, &image).image, image.to_string());
    }
}));
