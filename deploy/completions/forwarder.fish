# TAB completion of forwarder for fish; made by click: _FORWARDER_COMPLETE=fish_source forwarder

function _forwarder_completion;
    set -l response (env _FORWARDER_COMPLETE=fish_complete COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) forwarder);

    for completion in $response;
        set -l metadata (string split "," $completion);

        if test $metadata[1] = "dir";
            __fish_complete_directories $metadata[2];
        else if test $metadata[1] = "file";
            __fish_complete_path $metadata[2];
        else if test $metadata[1] = "plain";
            echo $metadata[2];
        end;
    end;
end;

complete --no-files --command forwarder --arguments "(_forwarder_completion)";
