# What is built above a mount while it is added below. `leaf` and `last` wait until whoever builds them opens the gate,
# a folder that the sandbox shows at /gate. `top` refers to `leaf`, and `user` to both; `late` is only built with
# `leaf`, and `last` refers to `late`. With the seed they are others.
{ tools, seeds }:
let
  sh = "${tools}/busybox";
  make = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = sh;
    args = [ "sh" "-euc" script ];
    PATH = "";
  };
  wait = name: ''
    : > /gate/${name}.reached
    until [ -e /gate/${name}.open ]; do ${sh} usleep 5000; done
  '';
  family = seed: rec {
    leaf = make "leaf-${seed}" ''
      ${sh} mkdir -p $out/bin
      ${wait seed}
      echo "leaf ${seed} of $out" > $out/text
      ${sh} cp ${sh} $out/bin/busybox
    '';
    top = make "top-${seed}" ''
      ${sh} mkdir $out
      ${sh} ln -s ${leaf} $out/leaf
      ${leaf}/bin/busybox cat ${leaf}/text > $out/text
    '';
    user = make "user-${seed}" ''
      ${sh} mkdir $out
      echo ${top} > $out/top
      ${leaf}/bin/busybox cat ${top}/leaf/text ${top}/text > $out/text
    '';
    late = make "late-${seed}" ''
      ${sh} mkdir $out
      ${leaf}/bin/busybox echo "late ${seed}" > $out/text
    '';
    last = make "last-${seed}" ''
      ${sh} mkdir $out
      ${wait "last-${seed}"}
      echo ${late} > $out/late
      ${sh} cat ${late}/text > $out/text
    '';
  };
  seedList = builtins.filter builtins.isString (builtins.split "," seeds);
in
{
  leaf = map (seed: (family seed).leaf) seedList;
  top = map (seed: (family seed).top) seedList;
  user = map (seed: (family seed).user) seedList;
  late = map (seed: (family seed).late) seedList;
  last = map (seed: (family seed).last) seedList;
}
